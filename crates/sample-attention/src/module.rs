//! Multi-head attention with SampleAttention inside.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Tensor, backend::Backend};

use crate::rotary::{Rotary, RotaryConfig};
use crate::{Attended, sample_attention_with_plan};
use crate::{AttentionBackend, Error, KeyValueCache, Preset, Report, SampleAttentionOptions};

/// Configuration of [`SampleAttention`].
///
/// ```
/// use burn::backend::Flex;
/// use burn::tensor::{Distribution, Tensor};
/// use sample_attention::{Preset, SampleAttentionConfig};
///
/// let device = Default::default();
/// let attention = SampleAttentionConfig::new(128, 4)
///     .with_kv_heads(Some(2))
///     .with_preset(Preset::Joint)
///     .init::<Flex>(&device);
/// let x = Tensor::random([1, 1500, 128], Distribution::Default, &device);
/// assert_eq!(attention.forward(x).dims(), [1, 1500, 128]);
/// ```
#[derive(Config, Debug)]
pub struct SampleAttentionConfig {
    /// Features of input and output.
    pub d_model: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads [default: as many as query heads].
    pub kv_heads: Option<usize>,
    /// Width of a head: a multiple of 16, at most 256 [default: `d_model / n_heads`].
    pub head_dim: Option<usize>,
    /// Whether q, k and v are one projection.
    #[config(default = true)]
    pub fused: bool,
    /// Whether the projections have a bias.
    #[config(default = false)]
    pub bias: bool,
    /// Rotary position embedding [default: none].
    pub rotary: Option<RotaryConfig>,
    /// What to keep.
    #[config(default = "Preset::Default")]
    pub preset: Preset,
    /// Lengths up to which all keys are attended [default: the preset's].
    pub dense_below: Option<usize>,
}

impl SampleAttentionConfig {
    /// Checks the sizes against each other.
    ///
    /// # Errors
    ///
    /// The first field that does not fit, with the value found and the value expected.
    pub fn validate(&self) -> Result<(), Error> {
        let wrong = |field, found: usize, expected: String| Err(Error::Config { field, found, expected });
        let (heads, kv_heads) = (self.n_heads, self.kv_heads());
        if self.d_model == 0 {
            return wrong("d_model", 0, "at least 1".to_string());
        }
        if heads == 0 || (self.head_dim.is_none() && !self.d_model.is_multiple_of(heads)) {
            return wrong("n_heads", heads, format!("a divisor of d_model ({})", self.d_model));
        }
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return wrong("kv_heads", kv_heads, format!("a divisor of n_heads ({heads})"));
        }
        let head_dim = self.head_dim();
        if !(16..=256).contains(&head_dim) || !head_dim.is_multiple_of(16) {
            return wrong("head_dim", head_dim, "a multiple of 16 in 16..=256".to_string());
        }
        match &self.rotary {
            Some(rotary)
                if rotary.width == 0 || rotary.width > head_dim || !rotary.width.is_multiple_of(2) =>
            {
                wrong("rotary.width", rotary.width, format!("an even number up to head_dim ({head_dim})"))
            }
            _ => Ok(()),
        }
    }

    fn kv_heads(&self) -> usize {
        self.kv_heads.unwrap_or(self.n_heads)
    }

    fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.d_model / self.n_heads.max(1))
    }

    /// Initializes the module.
    ///
    /// # Panics
    ///
    /// Where [`validate`](Self::validate) finds an error.
    pub fn init<B: Backend>(&self, device: &B::Device) -> SampleAttention<B> {
        self.validate().unwrap_or_else(|error| panic!("{error}"));
        let (kv_heads, head_dim) = (self.kv_heads(), self.head_dim());
        let linear =
            |d_input, d_output| LinearConfig::new(d_input, d_output).with_bias(self.bias).init(device);
        let widths = [self.n_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim];
        let inputs = if self.fused { vec![widths.iter().sum()] } else { widths.to_vec() };
        let options = self.preset.options();
        let dense_below =
            self.dense_below.filter(|_| self.preset != Preset::Dense).unwrap_or(options.dense_below);
        SampleAttention {
            inputs: inputs.into_iter().map(|width| linear(self.d_model, width)).collect(),
            output: linear(self.n_heads * head_dim, self.d_model),
            heads: self.n_heads,
            kv_heads,
            head_dim,
            rotary: self.rotary.clone(),
            options: SampleAttentionOptions { dense_below, ..options },
        }
    }
}

/// Causal multi-head attention over the keys that matter.
#[derive(Module, Debug)]
pub struct SampleAttention<B: Backend> {
    /// One projection to q, k and v, or one each.
    pub inputs: Vec<Linear<B>>,
    /// The projection of the heads' outputs.
    pub output: Linear<B>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    #[module(skip)]
    rotary: Option<RotaryConfig>,
    #[module(skip)]
    options: SampleAttentionOptions,
}

impl<B: AttentionBackend> SampleAttention<B> {
    /// Attention within `x`.
    ///
    /// # Shapes
    ///
    /// - x, output: `[batch, length, d_model]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let length = x.dims()[1];
        let [q, k, v] = self.project(x, 0);
        self.merge(self.attend(q, k, v).output, length)
    }

    /// As [`forward`](Self::forward), with what the plan kept: reads it from the device, and waits for it.
    ///
    /// # Errors
    ///
    /// A device that fails.
    pub fn forward_with_report(&self, x: Tensor<B, 3>) -> Result<(Tensor<B, 3>, Report), Error> {
        let [batch, length, _] = x.dims();
        let [q, k, v] = self.project(x, 0);
        let attended = self.attend(q, k, v);
        let report =
            attended.plan.map_or_else(|| Ok(Report::dense(batch * self.heads)), |plan| plan.report())?;
        Ok((self.merge(attended.output, length), report))
    }

    /// Attention from the next positions of a context to all that the cache holds, these included.
    ///
    /// # Shapes
    ///
    /// - x, output: `[batch, length, d_model]`
    ///
    /// # Panics
    ///
    /// If the cache was made for other heads or is full.
    pub fn forward_cache(&self, x: Tensor<B, 3>, cache: &mut KeyValueCache<B>) -> Tensor<B, 3> {
        let length = x.dims()[1];
        let [q, k, v] = self.project(x, cache.len());
        let (k, v) = cache.append(k, v);
        self.merge(self.attend(q, k, v).output, length)
    }

    /// Attention within each of several sequences that stand one after the other, without padding.
    ///
    /// # Shapes
    ///
    /// - x, output: `[sum of lengths, d_model]`
    ///
    /// # Panics
    ///
    /// If the lengths do not add up to the rows of `x`.
    pub fn forward_packed(&self, x: Tensor<B, 2>, lengths: &[usize]) -> Tensor<B, 2> {
        let (rows, total) = (x.dims()[0], lengths.iter().sum::<usize>());
        assert_eq!(rows, total, "lengths: found {total} rows in all, expected the {rows} of x");
        let mut first = 0;
        let outputs = lengths.iter().filter(|&&length| length > 0).map(|&length| {
            let sequence = x.clone().narrow(0, first, length).unsqueeze();
            first += length;
            self.forward(sequence).squeeze_dim(0)
        });
        Tensor::cat(outputs.collect(), 0)
    }

    /// Allocates a cache for `batch` sequences of up to `capacity` positions.
    pub fn cache(&self, batch: usize, capacity: usize) -> KeyValueCache<B> {
        let weight = self.output.weight.val();
        KeyValueCache::new([batch, self.kv_heads, capacity, self.head_dim], weight.dtype(), &weight.device())
    }

    /// q, k and v, `[batch, heads, length, head_dim]`, the first at position `start`.
    fn project(&self, x: Tensor<B, 3>, start: usize) -> [Tensor<B, 4>; 3] {
        let [batch, length, _] = x.dims();
        let heads = [self.heads, self.kv_heads, self.kv_heads];
        let parts: Vec<Tensor<B, 3>> = match &self.inputs[..] {
            [fused] => {
                fused.forward(x).split_with_sizes(heads.map(|heads| heads * self.head_dim).to_vec(), 2)
            }
            separate => separate.iter().map(|linear| linear.forward(x.clone())).collect(),
        };
        let rotary: Option<Rotary<B>> =
            self.rotary.as_ref().map(|rotary| rotary.init(start, length, &parts[0].device()));
        let mut parts = parts.into_iter().zip(heads).enumerate().map(|(index, (part, heads))| {
            let part = part.reshape([batch, length, heads, self.head_dim]);
            let turned = match &rotary {
                Some(rotary) if index < 2 => rotary.forward(part),
                _ => part,
            };
            turned.swap_dims(1, 2)
        });
        std::array::from_fn(|_| parts.next().expect("q, k and v"))
    }

    fn attend(&self, q: Tensor<B, 4>, k: Tensor<B, 4>, v: Tensor<B, 4>) -> Attended<B> {
        sample_attention_with_plan(q, k, v, &self.options).unwrap_or_else(|error| panic!("{error}"))
    }

    fn merge(&self, heads: Tensor<B, 4>, length: usize) -> Tensor<B, 3> {
        let batch = heads.dims()[0];
        self.output.forward(heads.swap_dims(1, 2).reshape([batch, length, self.heads * self.head_dim]))
    }
}
