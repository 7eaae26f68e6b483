//! The kernels of a device against float64.

use std::path::PathBuf;

use burn::tensor::DType;
use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::ir::StorageType;
use sample_attention_kernels::Error as KernelError;
use sample_attention_kernels::selftest::{self, GoldenCase};

pub use sample_attention_kernels::selftest::Row;

use crate::{Device, Error, Kind};

impl Device {
    /// Runs golden cases from folders and random problems of growing size, in all types or in `only` one, with
    /// every tile product that the device offers; each row is handed over as it is done. Whether all of them
    /// passed.
    ///
    /// # Errors
    ///
    /// A folder that cannot be used, a device without kernels, or one that fails.
    pub fn selftest(
        &self,
        folders: &[PathBuf],
        only: Option<DType>,
        seed: u64,
        on_row: impl FnMut(&Row),
    ) -> Result<bool, Error> {
        let cases: Vec<GoldenCase> = folders
            .iter()
            .map(|folder| GoldenCase::load(folder))
            .collect::<Result<_, _>>()
            .map_err(Error::Case)?;
        let only = only.map(StorageType::from);
        match &self.kind {
            #[cfg(feature = "cuda")]
            Kind::Cuda => {
                run(&cubecl::cuda::CudaRuntime::client(&Default::default()), &cases, only, seed, on_row)
            }
            #[cfg(feature = "wgpu")]
            Kind::Wgpu(device) => run(&cubecl::wgpu::WgpuRuntime::client(device), &cases, only, seed, on_row),
            #[cfg(feature = "flex")]
            Kind::Cpu => Err(Error::NoKernels),
        }
    }
}

fn run<R: Runtime>(
    client: &ComputeClient<R>,
    cases: &[GoldenCase],
    only: Option<StorageType>,
    seed: u64,
    on_row: impl FnMut(&Row),
) -> Result<bool, Error> {
    selftest::run(client, cases, only, seed, on_row).map_err(|error| match error {
        KernelError::Device(error) => Error::Failed(error),
        other => Error::Case(other),
    })
}
