//! Tensor by tensor from the files into a module.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use burn::module::{Module, ParamId};
use burn::tensor::{DType, TensorData, backend::Backend};
use burn_store::{ModuleSnapshot, TensorSnapshot, TensorSnapshotError};
use bytemuck::pod_collect_to_vec;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use long_context::models::TensorSpec;

use crate::error::{Error, Result};
use crate::shards::{Shards, Stored};

/// Hears how many stored bytes have been read.
pub type Progress = Rc<dyn Fn(u64)>;

/// Uploads that may wait on the host; then the device catches up.
const PENDING_BYTES: u64 = 1 << 28;

/// Old checkpoints hold the rotary frequencies; they follow from the config and are never scaled there.
fn is_derived(name: &str) -> bool {
    name.ends_with("rotary_pos_emb.inv_freq") || name.ends_with("rotary_emb.inv_freq")
}

/// Checks that the files hold these tensors, with these shapes, and no others.
pub(crate) fn check(shards: &Shards, specs: &[TensorSpec]) -> Result<()> {
    for spec in specs {
        let Some(stored) = shards.tensors.get(&spec.name) else {
            let expected = format!("it, of shape {:?}", spec.shape);
            return Err(Error::tensor(&shards.source, &spec.name, "nothing", expected));
        };
        if stored.shape != spec.shape {
            let (found, expected) = (format!("shape {:?}", stored.shape), format!("{:?}", spec.shape));
            return Err(Error::tensor(&stored.file, &spec.name, found, expected));
        }
    }
    let known: BTreeSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    match shards.tensors.iter().find(|(name, _)| !known.contains(name.as_str()) && !is_derived(name)) {
        Some((name, stored)) => Err(Error::tensor(&stored.file, name, "it", "no such tensor in this model")),
        None => Ok(()),
    }
}

/// Loads every tensor of `specs` into `module`, in type `dtype`.
pub(crate) fn load<B: Backend, M: Module<B>>(
    shards: &Shards,
    mut module: M,
    specs: &[TensorSpec],
    dtype: DType,
    device: &B::Device,
    progress: &Progress,
) -> Result<M> {
    check(shards, specs)?;
    let failure: Rc<RefCell<Option<Error>>> = Rc::default();
    let (read, pending) = (Rc::new(RefCell::new(0)), Rc::new(RefCell::new(0)));
    let snapshots = specs
        .iter()
        .map(|spec| {
            let stored = shards.tensors[&spec.name].clone();
            let (name, device, progress) = (spec.name.clone(), device.clone(), progress.clone());
            let (failure, read, pending) = (failure.clone(), read.clone(), pending.clone());
            let data = move || {
                let bytes = stored.bytes();
                if *pending.borrow() > PENDING_BYTES {
                    *pending.borrow_mut() = 0;
                    // A device that fails here fails again where its results are read.
                    let _ = B::sync(&device);
                }
                *pending.borrow_mut() += bytes;
                let data = to_data(&stored, &name, dtype).map_err(|error| {
                    let text = error.to_string();
                    failure.borrow_mut().get_or_insert(error);
                    TensorSnapshotError::DataError(text)
                })?;
                *read.borrow_mut() += bytes;
                progress(*read.borrow());
                Ok(data)
            };
            let path = spec.path.split('.').map(str::to_string).collect();
            TensorSnapshot::from_closure(
                Rc::new(data),
                dtype,
                spec.shape.clone().into(),
                path,
                Vec::new(),
                ParamId::new(),
            )
        })
        .collect();
    let result = module.apply(snapshots, None, None, true);
    if let Some(error) = failure.take() {
        return Err(error);
    }
    // The names were checked against the files; here they are checked against the module itself.
    if let Some(name) = result.unused.first().or(result.missing.first().map(|(path, _)| path)) {
        return Err(Error::invalid(
            &shards.source,
            format_args!("parameter `{name}`"),
            "no match",
            "one tensor a parameter",
        ));
    }
    if let Some(error) = result.errors.first() {
        return Err(Error::invalid(&shards.source, "module", error, "every tensor to fit"));
    }
    Ok(module)
}

fn to_data(stored: &Stored, name: &str, dtype: DType) -> Result<TensorData> {
    let shape = stored.shape.clone();
    stored.read(name, |bytes| match dtype {
        // The common case, at the speed of a copy.
        _ if stored.dtype == dtype && cfg!(target_endian = "little") => match dtype {
            DType::F16 => TensorData::new(pod_collect_to_vec::<u8, f16>(bytes), shape),
            DType::BF16 => TensorData::new(pod_collect_to_vec::<u8, bf16>(bytes), shape),
            _ => TensorData::new(pod_collect_to_vec::<u8, f32>(bytes), shape),
        },
        DType::F16 => TensorData::new(convert(bytes, stored.dtype, f16::from_f32), shape),
        DType::BF16 => TensorData::new(convert(bytes, stored.dtype, bf16::from_f32), shape),
        _ => TensorData::new(convert(bytes, stored.dtype, |value| value), shape),
    })
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u16> + '_ {
    bytes.chunks_exact(2).map(|word| u16::from_le_bytes([word[0], word[1]]))
}

/// Widens stored values to f32 block by block and narrows them again.
fn convert<T>(bytes: &[u8], stored: DType, narrow: impl Fn(f32) -> T) -> Vec<T> {
    const BLOCK: usize = 4096;
    match stored {
        DType::F32 => bytes
            .chunks_exact(4)
            .map(|word| narrow(f32::from_le_bytes([word[0], word[1], word[2], word[3]])))
            .collect(),
        DType::BF16 => words(bytes).map(|word| narrow(bf16::from_bits(word).to_f32())).collect(),
        _ => {
            let mut values = Vec::with_capacity(bytes.len() / 2);
            let mut wide = [0.0; BLOCK];
            for block in bytes.chunks(2 * BLOCK) {
                let halves: Vec<u16> = words(block).collect();
                let wide = &mut wide[..halves.len()];
                halves.reinterpret_cast::<f16>().convert_to_f32_slice(wide);
                values.extend(wide.iter().map(|&value| narrow(value)));
            }
            values
        }
    }
}
