//! Inputs with the structure of real attention, at a density that is asked for.
//!
//! Every query head looks in one of four channels of dimensions, where some keys (*stripes*) stand out for all
//! queries after them, and the first four keys (*sinks*) most of all. In other dimensions neighbours attract each
//! other. Diffuse heads have neither and end up dense. Beneath lies noise that all heads share. One number, the
//! share of keys that stand out, sets the density.

use std::f64::consts::TAU;
use std::ops::Range;
use std::thread;

use burn::tensor::{DType, Tensor, TensorData};
use sample_attention::{AttentionBackend, SampleAttentionOptions, sample_attention_with_plan};

use crate::Error;

/// Channels that heads look in; a sixteenth of the dimensions each.
pub const CHANNELS: usize = 4;
/// How the share of keys that stand out differs between channels, 1 on average.
const BREADTH: [f64; CHANNELS] = [0.5, 0.8, 1.2, 1.5];
const SINKS: usize = 4;
/// Mass on stripes over the mass on all other keys but sinks and neighbours, about.
const STRIPE_MASS: f64 = 40.0;
/// Deviation of the noise in queries and keys; that of values is 1.
const NOISE: f64 = 0.5;
/// Wavelengths of the attraction between neighbours, in positions.
const SHORTEST_WAVE: f64 = 16.0;
const OCTAVES: f64 = 8.0;
/// The largest share that a target density is looked for at; the smallest makes so many stripes: with fewer, rows
/// early in the text see none of their channel and need many other columns.
const LARGEST_SHARE: f64 = 0.6;
const FEWEST_STRIPES: f64 = 128.0;
/// Steps of the search at most, and how close ends it.
const STEPS: usize = 8;
const CLOSE: f64 = 0.02;

/// What inputs look like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Structure {
    /// Positions.
    pub length: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head, a multiple of 16.
    pub head_dim: usize,
    /// Query heads that attend to everything alike.
    pub diffuse: usize,
    /// Share of keys that stand out, in (0, 1).
    pub share: f64,
    /// Seed of noise and stripes.
    pub seed: u64,
}

/// The noise beneath queries, keys and values, each `[length, head_dim]`; one serves every shorter length.
#[derive(Debug, Clone)]
pub struct Noise {
    head_dim: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Noise {
    /// Draws it.
    pub fn new(length: usize, head_dim: usize, seed: u64) -> Self {
        let draw = |stream: u64, deviation: f64| {
            fill(length * head_dim, |index| (deviation * normal(seed, stream, index)) as f32)
        };
        Self { head_dim, q: draw(1, NOISE), k: draw(2, NOISE), v: draw(3, 1.0) }
    }

    /// Positions that it covers.
    pub fn length(&self) -> usize {
        self.q.len() / self.head_dim
    }
}

/// What is laid over the noise beside the attraction between neighbours, on the host.
#[derive(Debug, Clone)]
pub struct Overlay {
    /// `[heads, CHANNELS]`: how strongly a query looks in a channel.
    pub look: Vec<f32>,
    /// `[heads]`: 1 where neighbours attract each other, 0 in diffuse heads.
    pub near: Vec<f32>,
    /// `[kv_heads, length, CHANNELS]`: how far a key stands out in a channel.
    pub pull: Vec<f32>,
}

/// What inputs of one length have in common, on a device.
pub(crate) struct Ground<B: AttentionBackend> {
    /// `[1, 1, length, head_dim]`, and so are `k` and `v`.
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    /// `[1, 1, length, head_dim / 4]`
    local: Tensor<B, 4>,
    dtype: DType,
    device: B::Device,
}

impl<B: AttentionBackend> Ground<B> {
    /// Uploads noise and neighbours for a structure's length.
    pub fn new(structure: &Structure, noise: &Noise, dtype: DType, device: &B::Device) -> Self {
        let shape = |width| [1, 1, structure.length, width];
        let [q, k, v] = structure
            .noise(noise)
            .map(|values| upload(values.to_vec(), shape(structure.head_dim), dtype, device));
        let local = upload(structure.local(), shape(structure.head_dim / 4), dtype, device);
        Self { q, k, v, local, dtype, device: device.clone() }
    }

    /// Positions that it covers.
    pub fn length(&self) -> usize {
        self.q.dims()[2]
    }

    fn upload(&self, values: Vec<f32>, shape: [usize; 4]) -> Tensor<B, 4> {
        upload(values, shape, self.dtype, &self.device)
    }
}

fn upload<B: AttentionBackend>(
    values: Vec<f32>,
    shape: [usize; 4],
    dtype: DType,
    device: &B::Device,
) -> Tensor<B, 4> {
    Tensor::from_data(TensorData::new(values, shape).convert_dtype(dtype), (device, dtype))
}

impl Structure {
    /// Dimensions of a channel.
    pub fn channel_width(&self) -> usize {
        self.head_dim / 16
    }

    fn is_diffuse(&self, head: usize) -> bool {
        (head + 1) * self.diffuse / self.heads != head * self.diffuse / self.heads
    }

    /// The same with a few heads: one for each channel and a diffuse one.
    fn probe(&self) -> Self {
        Self { heads: CHANNELS + 1, kv_heads: 1, diffuse: 1, ..*self }
    }

    /// What is laid over the noise.
    pub fn overlay(&self) -> Overlay {
        let Self { length, heads, kv_heads, head_dim, seed, .. } = *self;
        let (root, width) = ((head_dim as f64).sqrt(), self.channel_width() as f64);
        // Scores: that of a stripe outweighs the other keys by number, that of a sink grows with the length.
        let shares = BREADTH.map(|breadth| (self.share * breadth).min(0.9));
        let looks = shares.map(|share| ((STRIPE_MASS / share).ln() * root / width).sqrt());
        let sinks = looks.map(|look| (length as f64).ln() * root / width / look);
        let look = |index: usize| {
            let (head, channel) = (index / CHANNELS, index % CHANNELS);
            let looks_here = head % CHANNELS == channel && !self.is_diffuse(head);
            if looks_here { looks[channel] as f32 } else { 0.0 }
        };
        let pull = |index: usize| {
            let (key, channel) = (index / CHANNELS % length, index % CHANNELS);
            let pull = if key < SINKS {
                sinks[channel]
            } else if uniform(seed, 4, index) < shares[channel] {
                looks[channel]
            } else {
                0.0
            };
            pull as f32
        };
        Overlay {
            look: fill(heads * CHANNELS, look),
            near: (0..heads).map(|head| if self.is_diffuse(head) { 0.0 } else { 1.0 }).collect(),
            pull: fill(kv_heads * length * CHANNELS, pull),
        }
    }

    /// What lets neighbours attract each other, `[length, head_dim / 4]`: added to queries and keys behind the
    /// channels.
    pub fn local(&self) -> Vec<f32> {
        let (length, pairs) = (self.length, self.head_dim / 8);
        let amplitude = (0.75 * (length as f64).ln() * (self.head_dim as f64).sqrt() / pairs as f64).sqrt();
        fill(length * 2 * pairs, |index| {
            let (position, at) = ((index / (2 * pairs)) as f64, index % (2 * pairs));
            let wave = SHORTEST_WAVE * (OCTAVES * (at / 2) as f64 / pairs as f64).exp2();
            let angle = TAU * position / wave;
            (amplitude * if at.is_multiple_of(2) { angle.cos() } else { angle.sin() }) as f32
        })
    }

    /// The noise of this length, in order q, k, v.
    pub fn noise<'a>(&self, noise: &'a Noise) -> [&'a [f32]; 3] {
        [&noise.q, &noise.k, &noise.v].map(|values| &values[..self.length * self.head_dim])
    }

    /// Puts q, k and v together on a device.
    ///
    /// # Shapes
    ///
    /// - output: `[1, heads, length, head_dim]`, then twice `[1, kv_heads, length, head_dim]`
    pub(crate) fn tensors<B: AttentionBackend>(&self, ground: &Ground<B>) -> [Tensor<B, 4>; 3] {
        let overlay = self.overlay();
        let q = self.queries(ground, &overlay, 0..self.length);
        let k = self.keys(ground, overlay);
        // A copy of its own for each head, as in a model.
        [q, k, ground.v.clone().repeat_dim(1, self.kv_heads)]
    }

    /// Puts the queries of some positions together.
    ///
    /// # Shapes
    ///
    /// - output: `[1, heads, positions, head_dim]`
    pub(crate) fn queries<B: AttentionBackend>(
        &self,
        ground: &Ground<B>,
        overlay: &Overlay,
        positions: Range<usize>,
    ) -> Tensor<B, 4> {
        let at = |tensor: &Tensor<B, 4>| tensor.clone().narrow(2, positions.start, positions.len());
        let look = self.spread(ground.upload(overlay.look.clone(), [1, self.heads, 1, CHANNELS]));
        let near = ground.upload(overlay.near.clone(), [1, self.heads, 1, 1]);
        self.over(at(&ground.q), self.heads, look, at(&ground.local) * near)
    }

    /// Puts all keys together.
    ///
    /// # Shapes
    ///
    /// - output: `[1, kv_heads, length, head_dim]`
    pub(crate) fn keys<B: AttentionBackend>(&self, ground: &Ground<B>, overlay: Overlay) -> Tensor<B, 4> {
        let shape = [1, self.kv_heads, self.length, CHANNELS];
        let pull = self.spread(ground.upload(overlay.pull, shape));
        self.over(ground.k.clone(), self.kv_heads, pull, ground.local.clone())
    }

    /// One number a channel, over all its dimensions.
    fn spread<B: AttentionBackend>(&self, channel: Tensor<B, 4>) -> Tensor<B, 4> {
        let ([_, heads, rows, _], width) = (channel.dims(), self.channel_width());
        let wide = channel.unsqueeze_dim::<5>(4).expand([1, heads, rows, CHANNELS, width]);
        wide.reshape([1, heads, rows, CHANNELS * width])
    }

    /// Noise with channels and neighbours over it.
    fn over<B: AttentionBackend>(
        &self,
        noise: Tensor<B, 4>,
        heads: usize,
        channel: Tensor<B, 4>,
        local: Tensor<B, 4>,
    ) -> Tensor<B, 4> {
        let (channels, locals, rows) = (CHANNELS * self.channel_width(), self.head_dim / 4, noise.dims()[2]);
        let part = |first, width| noise.clone().narrow(3, first, width);
        let (looking, near) = (part(0, channels) + channel, part(channels, locals) + local);
        let rest = part(channels + locals, self.head_dim - channels - locals);
        let parts = [looking, near, rest].map(|part| {
            let width = part.dims()[3];
            part.expand([1, heads, rows, width])
        });
        Tensor::cat(parts.into(), 3)
    }

    /// The share at which a plan of `options` keeps `target` of the causal pairs, and the density there.
    ///
    /// A search over runs of a few heads at the full length, prefilled in chunks.
    ///
    /// # Errors
    ///
    /// Options that do not fit, or a failing device.
    pub(crate) fn tune<B: AttentionBackend>(
        &self,
        ground: &Ground<B>,
        options: &SampleAttentionOptions,
        (target, chunk): (f64, usize),
    ) -> Result<(f64, f64), Error> {
        let mut best = (f64::NAN, f64::INFINITY);
        let mut density_at = |share: f64| {
            let structure = Self { share, ..*self };
            let density = structure.density(ground, options, chunk)?;
            if (density - target).abs() < (best.1 - target).abs() {
                best = (share, density);
            }
            Ok::<f64, Error>(density)
        };
        let (mut low, mut high) = ((FEWEST_STRIPES / self.length as f64).min(0.1), LARGEST_SHARE);
        let (mut at_low, mut at_high) = (density_at(low)?, density_at(high)?);
        // A target out of reach is met by the nearest end.
        for step in 0..if at_low < target && target < at_high { STEPS } else { 0 } {
            // The density grows with the share, nearly in proportion.
            let inside = (target - at_low) / (at_high - at_low);
            let share = low + (high - low) * if step % 3 == 2 { 0.5 } else { inside.clamp(0.02, 0.98) };
            let density = density_at(share)?;
            if (density / target - 1.0).abs() < CLOSE {
                break;
            }
            if density < target {
                (low, at_low) = (share, density);
            } else {
                (high, at_high) = (share, density);
            }
        }
        Ok(best)
    }

    /// The density that all heads would have, from a few of them.
    fn density<B: AttentionBackend>(
        &self,
        ground: &Ground<B>,
        options: &SampleAttentionOptions,
        chunk: usize,
    ) -> Result<f64, Error> {
        let [q, k, v] = self.probe().tensors(ground);
        let (mut kept, mut pairs) = (vec![0.0; CHANNELS + 1], 0.0);
        for start in (0..self.length).step_by(chunk) {
            let rows = chunk.min(self.length - start);
            let until = |tensor: &Tensor<B, 4>| tensor.clone().narrow(2, 0, start + rows);
            let queries = q.clone().narrow(2, start, rows);
            let attended = sample_attention_with_plan(queries, until(&k), until(&v), options)?;
            let densities: Vec<f32> = match attended.plan {
                Some(plan) => plan.report()?.heads.iter().map(|head| head.density).collect(),
                None => vec![1.0; CHANNELS + 1],
            };
            let here = rows as f64 * (start as f64 + (rows as f64 + 1.0) / 2.0);
            kept.iter_mut().zip(densities).for_each(|(kept, density)| *kept += here * f64::from(density));
            pairs += here;
        }
        let looking = kept[..CHANNELS].iter().sum::<f64>() / CHANNELS as f64;
        let diffuse = self.diffuse as f64 / self.heads as f64;
        Ok((looking * (1.0 - diffuse) + kept[CHANNELS] * diffuse) / pairs)
    }
}

/// Values by index, on all processors.
fn fill(count: usize, value: impl Fn(usize) -> f32 + Sync) -> Vec<f32> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let part = count.div_ceil(threads).max(1 << 14);
    let mut values = vec![0.0; count];
    thread::scope(|scope| {
        for (index, values) in values.chunks_mut(part).enumerate() {
            let value = &value;
            scope.spawn(move || {
                for (at, slot) in values.iter_mut().enumerate() {
                    *slot = value(index * part + at);
                }
            });
        }
    });
    values
}

/// 64 random bits of an index (splitmix64).
fn bits(seed: u64, stream: u64, index: usize) -> u64 {
    let mut x =
        (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add((seed << 8) ^ (stream << 56));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Uniform in 0..1.
fn uniform(seed: u64, stream: u64, index: usize) -> f64 {
    (bits(seed, stream, index) >> 11) as f64 / (1u64 << 53) as f64
}

/// About normal, of deviation 1: four uniform numbers of 16 bits each.
fn normal(seed: u64, stream: u64, index: usize) -> f64 {
    let bits = bits(seed, stream, index);
    let sum: u64 = (0..4).map(|word| (bits >> (16 * word)) & 0xffff).sum();
    (sum as f64 / 65535.0 - 2.0) * 3.0f64.sqrt()
}
