//! Attention alone on a device, to be timed and checked.

use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Tensor, TensorData};
use sample_attention::{
    AttentionShape, HostPlan, Preset, Report, SampleAttentionOptions, StageTimes, StagedBackend, reference,
    sample_attention_with_plan, time_stages,
};

use crate::op::floats;
use crate::structured::{Ground, Noise, Structure};
use crate::{Device, Error, Kind, OpInputs};

/// One of the sets of inputs that a bench holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InputSet(usize);

/// Attention alone on a device, over sets of inputs that it holds.
pub trait AttentionBench {
    /// Forgets all inputs and gives their memory back.
    fn clear(&mut self);

    /// Makes structured inputs.
    ///
    /// # Errors
    ///
    /// A failing device.
    fn add_structured(&mut self, structure: &Structure, noise: &Noise) -> Result<InputSet, Error>;

    /// Uploads the first `length` positions of tensors from the host.
    ///
    /// # Errors
    ///
    /// Fewer positions than that, or a failing device.
    fn add(&mut self, inputs: &OpInputs, length: usize) -> Result<InputSet, Error>;

    /// The share of keys that stand out at which a plan keeps `target` of the causal pairs, and the density
    /// found there; the nearest where the target is out of reach.
    ///
    /// # Errors
    ///
    /// Options that do not fit, or a failing device.
    fn tune(
        &mut self,
        structure: &Structure,
        noise: &Noise,
        options: &SampleAttentionOptions,
        target: f64,
    ) -> Result<(f64, f64), Error>;

    /// Attends `calls` times, the device idle before and after.
    ///
    /// # Errors
    ///
    /// Options that do not fit, or a failing device.
    fn run(
        &mut self,
        set: InputSet,
        options: &SampleAttentionOptions,
        calls: usize,
    ) -> Result<Duration, Error>;

    /// Attends densely from the last position alone, `calls` times, the device idle before and after.
    ///
    /// # Errors
    ///
    /// A failing device.
    fn decode(&mut self, set: InputSet, calls: usize) -> Result<Duration, Error>;

    /// Times the stages apart.
    ///
    /// # Errors
    ///
    /// Options that do not fit, or a failing device.
    fn stages(&mut self, set: InputSet, options: &SampleAttentionOptions) -> Result<StageTimes, Error>;

    /// What a call keeps, and how far a few rows of its output are from float64 over the keys that it keeps: the
    /// largest relative error, by Euclidean norm. `queries` is 1 for a decode step, else all.
    ///
    /// # Errors
    ///
    /// Options that do not fit, or a failing device.
    fn inspect(
        &mut self,
        set: InputSet,
        options: &SampleAttentionOptions,
        queries: Option<usize>,
    ) -> Result<(Report, f64), Error>;
}

impl Device {
    /// A bench without inputs, in the device's type.
    pub fn attention_bench(&self) -> Box<dyn AttentionBench> {
        match &self.kind {
            #[cfg(feature = "cuda")]
            Kind::Cuda => bench::<burn_cubecl::CubeBackend<cubecl::cuda::CudaRuntime, f32, i32, u8>>(
                Default::default(),
                self.dtype,
                Some(crate::largest_buffer::<cubecl::cuda::CudaRuntime>(&Default::default())),
            ),
            #[cfg(feature = "wgpu")]
            Kind::Wgpu(device) => {
                bench::<burn_cubecl::CubeBackend<cubecl::wgpu::WgpuRuntime, f32, i32, u32>>(
                    device.clone(),
                    self.dtype,
                    Some(crate::largest_buffer::<cubecl::wgpu::WgpuRuntime>(device)),
                )
            }
            #[cfg(feature = "flex")]
            Kind::Cpu => bench::<burn::backend::Flex>(Default::default(), self.dtype, None),
        }
    }
}

fn bench<B: StagedBackend>(
    device: B::Device,
    dtype: DType,
    largest_buffer: Option<u64>,
) -> Box<dyn AttentionBench> {
    Box::new(Bench::<B> { device, dtype, largest_buffer, sets: Vec::new(), ground: None })
}

struct Bench<B: StagedBackend> {
    device: B::Device,
    dtype: DType,
    /// In bytes.
    largest_buffer: Option<u64>,
    sets: Vec<[Tensor<B, 4>; 3]>,
    /// Of the last structure.
    ground: Option<Ground<B>>,
}

impl<B: StagedBackend> Bench<B> {
    fn sync(&self) -> Result<(), Error> {
        B::sync(&self.device).map_err(|error| Error::Failed(error.to_string()))
    }

    fn ground(&mut self, structure: &Structure, noise: &Noise) -> &Ground<B> {
        let held = self.ground.take().filter(|ground| ground.length() == structure.length);
        let ground = held.unwrap_or_else(|| Ground::new(structure, noise, self.dtype, &self.device));
        self.ground.insert(ground)
    }

    fn hold(&mut self, tensors: [Tensor<B, 4>; 3]) -> Result<InputSet, Error> {
        self.sets.push(tensors);
        self.sync()?;
        Ok(InputSet(self.sets.len() - 1))
    }

    /// q, k and v with the last `queries` rows of q alone.
    fn tensors(&self, set: InputSet, queries: Option<usize>) -> [Tensor<B, 4>; 3] {
        let [q, k, v] = self.sets[set.0].clone();
        let rows = q.dims()[2];
        let queries = queries.unwrap_or(rows);
        [q.narrow(2, rows - queries, queries), k, v]
    }

    fn time(
        &self,
        set: InputSet,
        options: &SampleAttentionOptions,
        (calls, queries): (usize, Option<usize>),
    ) -> Result<Duration, Error> {
        let [q, k, v] = self.tensors(set, queries);
        self.sync()?;
        let begin = Instant::now();
        for _ in 0..calls {
            drop(sample_attention_with_plan(q.clone(), k.clone(), v.clone(), options)?);
        }
        self.sync()?;
        Ok(begin.elapsed())
    }
}

impl<B: StagedBackend> AttentionBench for Bench<B> {
    fn clear(&mut self) {
        self.sets.clear();
        self.ground = None;
        B::memory_cleanup(&self.device);
    }

    fn add_structured(&mut self, structure: &Structure, noise: &Noise) -> Result<InputSet, Error> {
        let bytes = (structure.heads * structure.length * structure.head_dim * self.dtype.size()) as u64;
        if let Some(largest) = self.largest_buffer.filter(|largest| bytes > *largest) {
            return Err(Error::TooLarge { length: structure.length, bytes, largest });
        }
        let tensors = structure.tensors(self.ground(structure, noise));
        self.hold(tensors)
    }

    fn add(&mut self, inputs: &OpInputs, length: usize) -> Result<InputSet, Error> {
        let tensors = [&inputs.q, &inputs.k, &inputs.v].map(|(values, shape)| {
            let data = TensorData::new(values.clone(), *shape).convert_dtype(self.dtype);
            Tensor::<B, 4>::from_data(data, (&self.device, self.dtype)).narrow(2, 0, length)
        });
        self.hold(tensors)
    }

    fn tune(
        &mut self,
        structure: &Structure,
        noise: &Noise,
        options: &SampleAttentionOptions,
        target: f64,
    ) -> Result<(f64, f64), Error> {
        structure.tune(self.ground(structure, noise), options, (target, structure.length))
    }

    fn run(
        &mut self,
        set: InputSet,
        options: &SampleAttentionOptions,
        calls: usize,
    ) -> Result<Duration, Error> {
        self.time(set, options, (calls, None))
    }

    fn decode(&mut self, set: InputSet, calls: usize) -> Result<Duration, Error> {
        self.time(set, &Preset::Dense.options(), (calls, Some(1)))
    }

    fn stages(&mut self, set: InputSet, options: &SampleAttentionOptions) -> Result<StageTimes, Error> {
        let [q, k, v] = self.tensors(set, None);
        Ok(time_stages(q, k, v, options)?)
    }

    fn inspect(
        &mut self,
        set: InputSet,
        options: &SampleAttentionOptions,
        queries: Option<usize>,
    ) -> Result<(Report, f64), Error> {
        let [q, k, v] = self.tensors(set, queries);
        let shape = sample_attention::check(&q, &k, &v, options)?;
        let AttentionShape { q_heads, q_len, head_dim, .. } = shape;
        let attended = sample_attention_with_plan(q.clone(), k.clone(), v.clone(), options)?;
        let (plans, report) = match attended.plan {
            Some(plan) => (plan.clone().read()?, plan.report()?),
            None => {
                let heads = shape.heads();
                (vec![HostPlan::dense(shape.blocks(options)); heads], Report::dense(heads))
            }
        };
        // Early, middle and late rows, the last one among them, of the first, a middle and the last head.
        let rows = [(0, 0), (q_heads / 2, q_len / 2), (q_heads - 1, q_len * 4 / 5), (q_heads - 1, q_len - 1)];
        let mut samples = Vec::new();
        for (head, row) in rows {
            let of_head = |tensor: &Tensor<B, 4>, head| tensor.clone().narrow(0, 0, 1).narrow(1, head, 1);
            let of_row = |tensor: &Tensor<B, 4>| floats(of_head(tensor, head).narrow(2, row, 1));
            let seen = |tensor: &Tensor<B, 4>| floats(of_head(tensor, head / shape.group()));
            // Of the queries only this one is looked at.
            let mut queries = vec![0.0; q_len * head_dim];
            queries[row * head_dim..][..head_dim].copy_from_slice(&of_row(&q)?);
            let (k, v, found) = (seen(&k)?, seen(&v)?, of_row(&attended.output)?);
            samples.push(Sample { row, q: queries, k, v, plan: &plans[head], found });
        }
        let one = AttentionShape { batch: 1, q_heads: 1, kv_heads: 1, ..shape };
        let errors: Vec<f64> = thread::scope(|scope| {
            let compared: Vec<_> =
                samples.iter().map(|sample| scope.spawn(|| sample.error(&one, options))).collect();
            compared.into_iter().map(|thread| thread.join().unwrap_or(f64::INFINITY)).collect()
        });
        let worst = errors
            .into_iter()
            .fold(0.0, |worst, error| if error.is_finite() { f64::max(worst, error) } else { f64::INFINITY });
        Ok((report, worst))
    }
}

/// One row of one head's output, and all that it was computed from.
struct Sample<'a> {
    row: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    plan: &'a HostPlan,
    found: Vec<f32>,
}

impl Sample<'_> {
    /// Relative to float64, by Euclidean norm.
    fn error(&self, shape: &AttentionShape, options: &SampleAttentionOptions) -> f64 {
        let Self { row, q, k, v, plan, found } = self;
        let (expected, _) = reference::attention_row(shape, options, q, k, v, plan, (0, *row));
        let gap: f64 = found.iter().zip(&expected).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
        (gap / expected.iter().map(|x| x * x).sum::<f64>()).sqrt()
    }
}
