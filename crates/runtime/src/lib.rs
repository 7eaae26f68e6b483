//! Finds a device and puts a model on it. The one place that names backend types: behind it are a boxed
//! [`Engine`] and plain numbers, so that whatever uses it builds fast.

mod attention_bench;
mod model_bench;
mod op;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod selftest;
pub mod structured;

use burn::tensor::{DType, backend::Backend};
use long_context::generate::{Engine, GeneratorConfig};
use long_context::models::ModelConfig;
use long_context_weights::{Checkpoint, Progress};

use long_context::backend::LayerBackend;

use thiserror::Error;

pub use attention_bench::{AttentionBench, InputSet};
pub use model_bench::{ModelBench, Weights};
pub use op::{OpInputs, OpOutputs};
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub use selftest::Row;

/// Which backend to look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendChoice {
    /// CUDA, then a GPU adapter, then the CPU.
    Auto,
    /// NVIDIA, through CUDA.
    Cuda,
    /// Any Vulkan adapter, kernels compiled to SPIR-V.
    Vulkan,
    /// Any WebGPU adapter, kernels compiled to WGSL.
    Wgpu,
    /// The processor.
    Cpu,
}

/// What keeps a device from being used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A backend that this build or this machine does not have.
    #[error("--backend {name}: {}", if *built { missing } else { "not in this build (see the features of its Cargo.toml)" })]
    NoBackend {
        /// The backend.
        name: &'static str,
        /// Whether this build has it.
        built: bool,
        /// What is missing on this machine.
        missing: &'static str,
    },
    /// No backend at all.
    #[error("--backend auto: found no device; this build has no CPU backend")]
    NoDevice,
    /// A type that the device does not compute in.
    #[error("--dtype {dtype}: not supported by {backend} on {device}")]
    NoDtype {
        /// The type.
        dtype: &'static str,
        /// The backend.
        backend: &'static str,
        /// The device's name.
        device: String,
    },
    /// Input of the operator that does not fit.
    #[error("{0}")]
    Input(sample_attention::Error),
    /// A golden case that cannot be used.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    #[error("{0}")]
    Case(sample_attention_kernels::Error),
    /// A device that runs no kernels.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    #[error("--backend cpu: found no kernels to test, expected cuda, vulkan or wgpu")]
    NoKernels,
    /// A tensor that no buffer of the device holds.
    #[error(
        "length {length}: q takes {bytes} bytes, expected at most {largest}, this device's largest buffer"
    )]
    TooLarge {
        /// Its positions.
        length: usize,
        /// Its bytes.
        bytes: u64,
        /// Bytes of the largest buffer.
        largest: u64,
    },
    /// A device that fails.
    #[error("device: {}", one_line(.0))]
    Failed(String),
    /// A checkpoint that cannot be loaded.
    #[error(transparent)]
    Checkpoint(#[from] long_context_weights::Error),
}

impl From<sample_attention::Error> for Error {
    fn from(error: sample_attention::Error) -> Self {
        match error {
            sample_attention::Error::Device(error) => Self::Failed(error),
            other => Self::Input(other),
        }
    }
}

/// A model on its device.
pub struct Loaded {
    /// The model at work.
    pub engine: Box<dyn Engine>,
    /// Bytes that the device's allocator holds; `None` on the CPU, where they are host memory.
    pub device_bytes: Box<dyn Fn() -> Option<u64>>,
}

/// A device that was found, and the type to compute in.
#[derive(Debug, Clone)]
pub struct Device {
    kind: Kind,
    /// The backend's name, as `--backend` takes it.
    pub backend: &'static str,
    /// The device's own name.
    pub name: String,
    /// The driver, where it tells.
    pub driver: Option<String>,
    /// The type to compute in.
    pub dtype: DType,
}

#[derive(Debug, Clone)]
enum Kind {
    #[cfg(feature = "cuda")]
    Cuda,
    #[cfg(feature = "wgpu")]
    Wgpu(cubecl::wgpu::WgpuDevice),
    #[cfg(feature = "flex")]
    Cpu,
}

impl Device {
    /// Up to this context length dense attention is no slower than SampleAttention, as measured with the
    /// preset `default` (docs/performance.md).
    pub fn dense_below(&self) -> usize {
        match &self.kind {
            #[cfg(feature = "cuda")]
            Kind::Cuda => 4608,
            #[cfg(feature = "wgpu")]
            Kind::Wgpu(_) => 3584,
            #[cfg(feature = "flex")]
            Kind::Cpu => 1024,
        }
    }

    /// Finds the device for a choice; without a type, the one that suits the device.
    ///
    /// # Errors
    ///
    /// A backend that this build or this machine does not have, or a type that the device does not.
    pub fn find(choice: BackendChoice, dtype: Option<DType>) -> Result<Self, Error> {
        let Found { kind, backend, name, driver } = match choice {
            BackendChoice::Auto => cuda().or_else(|| adapter(true)).or_else(cpu).ok_or(Error::NoDevice),
            BackendChoice::Cuda => cuda().ok_or(Error::NoBackend {
                name: "cuda",
                built: cfg!(feature = "cuda"),
                missing: "no NVIDIA driver with a device",
            }),
            BackendChoice::Vulkan => {
                adapter(false).filter(|found| found.backend == "vulkan").ok_or(Error::NoBackend {
                    name: "vulkan",
                    built: cfg!(feature = "vulkan"),
                    missing: "no Vulkan adapter (on Debian, mesa-vulkan-drivers has one in software)",
                })
            }
            BackendChoice::Wgpu => {
                adapter(false).filter(|found| found.backend == "wgpu").ok_or(Error::NoBackend {
                    name: "wgpu",
                    built: cfg!(all(feature = "wgpu", not(feature = "vulkan"))),
                    missing: "no WebGPU adapter",
                })
            }
            BackendChoice::Cpu => cpu().ok_or(Error::NoBackend {
                name: "cpu",
                built: cfg!(feature = "flex"),
                missing: "no CPU",
            }),
        }?;
        let dtype = choose_dtype(&kind, &name, backend, dtype)?;
        Ok(Self { kind, backend, name, driver, dtype })
    }

    /// Loads the model of a checkpoint.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the checkpoint's tensors.
    pub fn load(
        &self,
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        limits: &GeneratorConfig,
        progress: Progress,
    ) -> Result<Loaded, Error> {
        match &self.kind {
            #[cfg(feature = "cuda")]
            Kind::Cuda => Ok(Loaded {
                engine: load::<burn::backend::Cuda>(
                    &Default::default(),
                    checkpoint,
                    config,
                    limits,
                    progress,
                )?,
                device_bytes: Box::new(|| reserved::<cubecl::cuda::CudaRuntime>(&Default::default())),
            }),
            #[cfg(feature = "wgpu")]
            Kind::Wgpu(device) => Ok(Loaded {
                engine: load::<burn::backend::Wgpu>(device, checkpoint, config, limits, progress)?,
                device_bytes: {
                    let device = device.clone();
                    Box::new(move || reserved::<cubecl::wgpu::WgpuRuntime>(&device))
                },
            }),
            #[cfg(feature = "flex")]
            Kind::Cpu => Ok(Loaded {
                engine: load::<burn::backend::Flex>(
                    &Default::default(),
                    checkpoint,
                    config,
                    limits,
                    progress,
                )?,
                device_bytes: Box::new(|| None),
            }),
        }
    }
}

fn load<B: LayerBackend>(
    device: &B::Device,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    limits: &GeneratorConfig,
    progress: Progress,
) -> Result<Box<dyn Engine>, Error> {
    let model = checkpoint.load::<B>(config, limits.dtype, device, progress)?;
    Ok(Box::new(limits.init(model, config, device)))
}

/// Reports of runtimes run over many lines and repeat themselves, once for each tensor at hand.
fn one_line(report: &str) -> String {
    let report = report.replace("No backtrace available", "");
    let mut parts: Vec<&str> = Vec::new();
    for line in report.lines() {
        let part = line.trim().trim_matches(|letter: char| "[](), :".contains(letter));
        if !part.is_empty() && part != "Caused by" && !parts.contains(&part) {
            parts.push(part);
        }
    }
    parts.join(": ")
}

/// Bytes of the largest buffer of a device.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn largest_buffer<R: cubecl::Runtime>(device: &R::Device) -> u64 {
    R::client(device).properties().memory.max_page_size
}

/// Bytes that the allocator of a device holds.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn reserved<R: cubecl::Runtime>(device: &R::Device) -> Option<u64> {
    R::client(device).memory_usage().ok().map(|usage| usage.bytes_reserved)
}

struct Found {
    kind: Kind,
    backend: &'static str,
    name: String,
    driver: Option<String>,
}

#[cfg(feature = "cuda")]
fn cuda() -> Option<Found> {
    use cudarc::driver::{CudaContext, result::device};
    // Where there is no driver at all, asking panics.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let name = std::panic::catch_unwind(|| {
        let count = CudaContext::device_count().unwrap_or(0);
        (count > 0)
            .then(|| device::get(0).and_then(device::get_name).unwrap_or_else(|_| "CUDA device".to_string()))
    });
    std::panic::set_hook(hook);
    Some(Found { kind: Kind::Cuda, backend: "cuda", name: name.ok().flatten()?, driver: nvidia_driver() })
}

/// The version of the kernel module, as Linux tells it.
#[cfg(feature = "cuda")]
fn nvidia_driver() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let version =
        text.split_whitespace().find(|word| word.starts_with(|first: char| first.is_ascii_digit()))?;
    Some(format!("NVIDIA {version}"))
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Option<Found> {
    None
}

/// The best adapter of the graphics API that this build compiles kernels for.
#[cfg(feature = "wgpu")]
fn adapter(gpu_only: bool) -> Option<Found> {
    use cubecl::wgpu::{AutoGraphicsApi, GraphicsApi, WgpuDevice};
    use wgpu::DeviceType;

    let api = AutoGraphicsApi::backend();
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: api.into(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let adapters = cubecl::future::block_on(instance.enumerate_adapters(api.into()));
    let found = adapters.iter().map(|adapter| adapter.get_info()).filter_map(|info| {
        let (rank, device) = match info.device_type {
            DeviceType::DiscreteGpu => (0, WgpuDevice::DiscreteGpu(0)),
            DeviceType::IntegratedGpu => (1, WgpuDevice::IntegratedGpu(0)),
            DeviceType::VirtualGpu => (2, WgpuDevice::VirtualGpu(0)),
            DeviceType::Cpu if !gpu_only => (3, WgpuDevice::Cpu),
            DeviceType::Cpu | DeviceType::Other => return None,
        };
        let driver = format!("{} {}", info.driver, info.driver_info).trim().to_string();
        Some((rank, device, info.name, driver))
    });
    let (_, device, name, driver) = found.min_by_key(|found| found.0)?;
    let backend = if cfg!(feature = "vulkan") && api == wgpu::Backend::Vulkan { "vulkan" } else { "wgpu" };
    let driver = Some(driver).filter(|driver| !driver.is_empty());
    Some(Found { kind: Kind::Wgpu(device), backend, name, driver })
}

#[cfg(not(feature = "wgpu"))]
fn adapter(_gpu_only: bool) -> Option<Found> {
    None
}

#[cfg(feature = "flex")]
fn cpu() -> Option<Found> {
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    Some(Found { kind: Kind::Cpu, backend: "cpu", name: format!("{threads} threads"), driver: None })
}

#[cfg(not(feature = "flex"))]
fn cpu() -> Option<Found> {
    None
}

fn choose_dtype(
    kind: &Kind,
    name: &str,
    backend: &'static str,
    choice: Option<DType>,
) -> Result<DType, Error> {
    let supports = |dtype| match kind {
        #[cfg(feature = "cuda")]
        Kind::Cuda => burn::backend::Cuda::<f32, i32>::supports_dtype(&Default::default(), dtype),
        #[cfg(feature = "wgpu")]
        Kind::Wgpu(device) => burn::backend::Wgpu::<f32, i32>::supports_dtype(device, dtype),
        #[cfg(feature = "flex")]
        Kind::Cpu => burn::backend::Flex::<f32, i32>::supports_dtype(&Default::default(), dtype),
    };
    // On a processor, half types save memory and cost time.
    let on_processor = match kind {
        #[cfg(feature = "flex")]
        Kind::Cpu => true,
        #[cfg(feature = "wgpu")]
        Kind::Wgpu(device) => *device == cubecl::wgpu::WgpuDevice::Cpu,
        #[allow(unreachable_patterns)]
        _ => false,
    };
    let dtype = match choice {
        Some(dtype) => dtype,
        None if on_processor => DType::F32,
        None => [DType::BF16, DType::F16].into_iter().find(|&dtype| supports(dtype)).unwrap_or(DType::F32),
    };
    if supports(dtype) {
        Ok(dtype)
    } else {
        Err(Error::NoDtype { dtype: dtype_name(dtype), backend, device: name.to_string() })
    }
}

/// A type's name, as `--dtype` takes it.
pub fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        _ => "f32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_told_in_one_line() {
        let report = "An error happened\nCaused by:\n  [Io(no page 0\nNo backtrace available), Io(no page 0\nNo \
                      backtrace available)]";
        let error = Error::Failed(report.to_string());
        assert_eq!(error.to_string(), "device: An error happened: Io(no page 0");
    }
}
