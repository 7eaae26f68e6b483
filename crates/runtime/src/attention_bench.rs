//! Attention alone on a device, to be timed and checked.

use std::time::{Duration, Instant};

use burn::tensor::{DType, Tensor, TensorData};
use sample_attention::{
    AttentionShape, HostPlan, Preset, Report, SampleAttentionOptions, StageTimes, StagedBackend, reference,
    sample_attention_with_plan, sample_attention_with_report, time_stages,
};

use crate::op::floats;
use crate::structured::{Noise, Structure};
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

    /// What a call keeps.
    ///
    /// # Errors
    ///
    /// Options that do not fit, or a failing device.
    fn report(&mut self, set: InputSet, options: &SampleAttentionOptions) -> Result<Report, Error>;

    /// Compares a few rows of the output with float64 over the keys that the plan keeps; the largest relative
    /// error, by Euclidean norm. `queries` is 1 for a decode step, else all.
    ///
    /// # Errors
    ///
    /// Options that do not fit, or a failing device.
    fn error(
        &mut self,
        set: InputSet,
        options: &SampleAttentionOptions,
        queries: Option<usize>,
    ) -> Result<f64, Error>;
}

impl Device {
    /// A bench without inputs, in the device's type.
    pub fn attention_bench(&self) -> Box<dyn AttentionBench> {
        match &self.kind {
            #[cfg(feature = "cuda")]
            Kind::Cuda => bench::<burn_cubecl::CubeBackend<cubecl::cuda::CudaRuntime, f32, i32, u8>>(
                Default::default(),
                self.dtype,
            ),
            #[cfg(feature = "wgpu")]
            Kind::Wgpu(device) => {
                bench::<burn_cubecl::CubeBackend<cubecl::wgpu::WgpuRuntime, f32, i32, u32>>(
                    device.clone(),
                    self.dtype,
                )
            }
            #[cfg(feature = "flex")]
            Kind::Cpu => bench::<burn::backend::Flex>(Default::default(), self.dtype),
        }
    }
}

fn bench<B: StagedBackend>(device: B::Device, dtype: DType) -> Box<dyn AttentionBench> {
    Box::new(Bench::<B> { device, dtype, sets: Vec::new() })
}

struct Bench<B: StagedBackend> {
    device: B::Device,
    dtype: DType,
    sets: Vec<[Tensor<B, 4>; 3]>,
}

impl<B: StagedBackend> Bench<B> {
    fn sync(&self) -> Result<(), Error> {
        B::sync(&self.device).map_err(|error| Error::Failed(error.to_string()))
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
        B::memory_cleanup(&self.device);
    }

    fn add_structured(&mut self, structure: &Structure, noise: &Noise) -> Result<InputSet, Error> {
        self.hold(structure.tensors(noise, self.dtype, &self.device))
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
        structure.tune::<B>(noise, options, (target, structure.length), self.dtype, &self.device)
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

    fn report(&mut self, set: InputSet, options: &SampleAttentionOptions) -> Result<Report, Error> {
        let [q, k, v] = self.tensors(set, None);
        Ok(sample_attention_with_report(q, k, v, options)?.1)
    }

    fn error(
        &mut self,
        set: InputSet,
        options: &SampleAttentionOptions,
        queries: Option<usize>,
    ) -> Result<f64, Error> {
        let [q, k, v] = self.tensors(set, queries);
        let shape = sample_attention::check(&q, &k, &v, options)?;
        let AttentionShape { q_heads, q_len, .. } = shape;
        let attended = sample_attention_with_plan(q.clone(), k.clone(), v.clone(), options)?;
        let plans = match attended.plan {
            Some(plan) => plan.read()?,
            None => vec![HostPlan::dense(shape.blocks(options)); shape.heads()],
        };
        let one = AttentionShape { batch: 1, q_heads: 1, kv_heads: 1, ..shape };
        let head_of =
            |tensor: &Tensor<B, 4>, head: usize| floats(tensor.clone().narrow(0, 0, 1).narrow(1, head, 1));
        let mut largest: f64 = 0.0;
        // Early, middle and late rows, the last one among them, of the first, a middle and the last head.
        for (head, row) in
            [(0, 0), (q_heads / 2, q_len / 2), (q_heads - 1, q_len * 4 / 5), (q_heads - 1, q_len - 1)]
        {
            let at_head = head / shape.group();
            let (k, v) = (head_of(&k, at_head)?, head_of(&v, at_head)?);
            let q = head_of(&q, head)?;
            let found = floats(attended.output.clone().narrow(0, 0, 1).narrow(1, head, 1).narrow(2, row, 1))?;
            let (expected, _) = reference::attention_row(&one, options, &q, &k, &v, &plans[head], (0, row));
            let gap: f64 = found.iter().zip(&expected).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
            let error = (gap / expected.iter().map(|x| x * x).sum::<f64>()).sqrt();
            largest = if error.is_finite() { largest.max(error) } else { f64::INFINITY };
        }
        Ok(largest)
    }
}
