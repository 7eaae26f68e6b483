//! A model on a device, to be timed.

use long_context::backend::LayerBackend;
use long_context::cache::StandIn;
use long_context::generate::{Engine, Generator, GeneratorConfig};
use long_context::models::ModelConfig;
use long_context_weights::{Checkpoint, Progress};
use sample_attention::SampleAttentionOptions;

use crate::structured::{Ground, Noise, Structure};
use crate::{Device, Error, Kind};

/// Where a model's weights come from.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    /// A checkpoint's files.
    Checkpoint(&'a Checkpoint),
    /// Drawn on the device.
    Random,
}

/// A model on a device, with attention inputs that can be replaced.
pub trait ModelBench {
    /// The model at work.
    fn engine(&mut self) -> &mut dyn Engine;

    /// Lets all layers attend with structured queries and keys from now on, or with their own again.
    ///
    /// # Errors
    ///
    /// A failing device.
    fn stand_in(&mut self, inputs: Option<(&Structure, &Noise)>) -> Result<(), Error>;

    /// As [`AttentionBench::tune`](crate::AttentionBench::tune), over a prefill in chunks.
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

    /// Bytes that the device's allocator holds; `None` on the CPU, where they are host memory.
    fn device_bytes(&self) -> Option<u64>;
}

impl Device {
    /// Puts a model of these dimensions on the device.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with a checkpoint's tensors.
    pub fn model_bench(
        &self,
        config: &ModelConfig,
        weights: Weights<'_>,
        limits: &GeneratorConfig,
        progress: Progress,
    ) -> Result<Box<dyn ModelBench>, Error> {
        match &self.kind {
            #[cfg(feature = "cuda")]
            Kind::Cuda => {
                bench::<burn::backend::Cuda>(Default::default(), (config, weights, limits), progress, || {
                    crate::reserved::<cubecl::cuda::CudaRuntime>(&Default::default())
                })
            }
            #[cfg(feature = "wgpu")]
            Kind::Wgpu(device) => {
                let of = device.clone();
                bench::<burn::backend::Wgpu>(device.clone(), (config, weights, limits), progress, move || {
                    crate::reserved::<cubecl::wgpu::WgpuRuntime>(&of)
                })
            }
            #[cfg(feature = "flex")]
            Kind::Cpu => {
                bench::<burn::backend::Flex>(Default::default(), (config, weights, limits), progress, || None)
            }
        }
    }
}

fn bench<B: LayerBackend>(
    device: B::Device,
    (config, weights, limits): (&ModelConfig, Weights<'_>, &GeneratorConfig),
    progress: Progress,
    bytes: impl Fn() -> Option<u64> + 'static,
) -> Result<Box<dyn ModelBench>, Error> {
    let model = match weights {
        Weights::Checkpoint(checkpoint) => checkpoint.load::<B>(config, limits.dtype, &device, progress)?,
        Weights::Random => config.init_random::<B>(limits.dtype, &device),
    };
    let generator = limits.init(model, config, &device);
    Ok(Box::new(Bench { generator, limits: limits.clone(), device, bytes: Box::new(bytes) }))
}

struct Bench<B: LayerBackend> {
    generator: Generator<B>,
    limits: GeneratorConfig,
    device: B::Device,
    bytes: Box<dyn Fn() -> Option<u64>>,
}

impl<B: LayerBackend> ModelBench for Bench<B> {
    fn engine(&mut self) -> &mut dyn Engine {
        &mut self.generator
    }

    fn stand_in(&mut self, inputs: Option<(&Structure, &Noise)>) -> Result<(), Error> {
        // The old ones go first: two do not always fit.
        self.generator.stand_in(None);
        let stand_in = inputs.map(|(structure, noise)| {
            let ground = Ground::new(structure, noise, self.limits.dtype, &self.device);
            let overlay = structure.overlay();
            let starts = (0..structure.length).step_by(self.limits.chunk);
            let pieces = starts.map(|start| start..structure.length.min(start + self.limits.chunk));
            let q = pieces.map(|positions| structure.queries(&ground, &overlay, positions)).collect();
            StandIn { q, k: structure.keys(&ground, overlay) }
        });
        self.generator.stand_in(stand_in);
        B::sync(&self.device).map_err(|error| Error::Failed(error.to_string()))
    }

    fn tune(
        &mut self,
        structure: &Structure,
        noise: &Noise,
        options: &SampleAttentionOptions,
        target: f64,
    ) -> Result<(f64, f64), Error> {
        let ground = Ground::<B>::new(structure, noise, self.limits.dtype, &self.device);
        structure.tune(&ground, options, (target, self.limits.chunk))
    }

    fn device_bytes(&self) -> Option<u64> {
        (self.bytes)()
    }
}
