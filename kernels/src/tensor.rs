//! Views of device tensors that the kernels read and write in place.

use core::marker::PhantomData;
use cubecl::{
    ir::{AddressType, FloatKind},
    prelude::*,
    server::Handle,
};

use crate::{AttentionShape, Error};

/// A `[batch, heads, length, head_dim]` view of device memory.
///
/// The last dimension is contiguous; the other strides are free, so permuted tensors and slices of
/// a preallocated cache need no copy.
#[derive(Debug)]
pub struct TensorView<R: Runtime> {
    /// The memory; its first element is the view's first.
    pub handle: Handle,
    /// `[batch, heads, length, head_dim]`.
    pub shape: [usize; 4],
    /// In elements.
    pub strides: [usize; 4],
    /// Element type: `f32`, `f16` or `bf16`.
    pub dtype: StorageType,
    runtime: PhantomData<R>,
}

impl<R: Runtime> Clone for TensorView<R> {
    fn clone(&self) -> Self {
        Self::new(self.handle.clone(), self.shape, self.strides, self.dtype)
    }
}

impl<R: Runtime> TensorView<R> {
    /// A view with the given strides. They are checked when the view is used.
    pub fn new(handle: Handle, shape: [usize; 4], strides: [usize; 4], dtype: StorageType) -> Self {
        Self { handle, shape, strides, dtype, runtime: PhantomData }
    }

    /// A view of a contiguous tensor.
    pub fn contiguous(handle: Handle, shape: [usize; 4], dtype: StorageType) -> Self {
        let [_, heads, length, dim] = shape;
        let strides = [heads * length * dim, length * dim, dim, 1];
        Self::new(handle, shape, strides, dtype)
    }

    /// Allocates an uninitialised contiguous tensor.
    pub fn empty(client: &ComputeClient<R>, shape: [usize; 4], dtype: StorageType) -> Self {
        let elements: usize = shape.iter().product();
        let handle = client.empty(elements * dtype.size());
        Self::contiguous(handle, shape, dtype)
    }

    /// Elements from the first to behind the last one that the view reaches.
    pub(crate) fn extent(&self) -> usize {
        let last: usize =
            self.shape.iter().zip(self.strides).map(|(&size, stride)| (size - 1) * stride).sum();
        last + 1
    }

    pub(crate) fn check(&self, name: &'static str, shape: [usize; 4]) -> Result<(), Error> {
        if self.shape != shape {
            let (found, expected) = (format!("{:?}", self.shape), format!("{shape:?}"));
            return Err(Error::tensor(name, "shape", found, expected));
        }
        if self.strides[3] != 1 {
            return Err(Error::tensor(name, "last stride", self.strides[3], 1));
        }
        let (bytes, needed) = (self.handle.size_in_used() as usize, self.extent() * self.dtype.size());
        if bytes < needed {
            let expected = format!("at least {needed} bytes");
            return Err(Error::tensor(name, "memory", bytes, expected));
        }
        Ok(())
    }

    /// Whether rows can be read as vectors of `width` elements.
    fn fits_width(&self, width: usize) -> bool {
        let offset = self.handle.offset_start.unwrap_or(0) as usize;
        let strides = &self.strides[..3];
        // The stride of a dimension of size 1 is never used.
        strides.iter().zip(self.shape).all(|(&stride, size)| size == 1 || stride.is_multiple_of(width))
            && offset.is_multiple_of(width * self.dtype.size())
    }

    /// Addresses that reach every element.
    pub(crate) fn address_type(&self) -> AddressType {
        AddressType::from_len(self.extent())
    }

    pub(crate) fn arg(&self) -> TensorArg<R> {
        // SAFETY: `check` compared shape and strides with the memory's size.
        unsafe { TensorArg::from_raw_parts(self.handle.clone(), self.strides.into(), self.shape.into()) }
    }
}

/// The checked inputs of an attention call.
pub(crate) struct Inputs<'a, R: Runtime> {
    pub q: &'a TensorView<R>,
    pub k: &'a TensorView<R>,
    pub v: &'a TensorView<R>,
    pub out: &'a TensorView<R>,
    pub shape: AttentionShape,
}

impl<'a, R: Runtime> Inputs<'a, R> {
    pub fn new(
        client: &ComputeClient<R>,
        q: &'a TensorView<R>,
        k: &'a TensorView<R>,
        v: &'a TensorView<R>,
        out: &'a TensorView<R>,
    ) -> Result<Self, Error> {
        let [batch, q_heads, q_len, head_dim] = q.shape;
        let [_, kv_heads, kv_len, _] = k.shape;
        let shape = AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim };
        shape.validate()?;
        let kv_shape = [batch, kv_heads, kv_len, head_dim];
        q.check("q", q.shape)?;
        k.check("k", kv_shape)?;
        v.check("v", kv_shape)?;
        out.check("out", q.shape)?;

        let accepted = [f32_type(), half_type(), bf16_type()];
        if !accepted.contains(&q.dtype) {
            return Err(Error::tensor("q", "type", q.dtype, "f32, f16 or bf16"));
        }
        for (name, tensor) in [("k", k), ("v", v), ("out", out)] {
            if tensor.dtype != q.dtype {
                return Err(Error::tensor(name, "type", tensor.dtype, q.dtype));
            }
        }
        if !client.properties().supports_type(q.dtype) {
            return Err(Error::Unsupported(format!("tensors of {}", q.dtype)));
        }
        let inputs = Self { q, k, v, out, shape };
        let address = inputs.address_type();
        if !client.properties().supports_address(address) {
            return Err(Error::Unsupported(format!("{address} addresses")));
        }
        Ok(inputs)
    }

    fn views(&self) -> [&TensorView<R>; 4] {
        [self.q, self.k, self.v, self.out]
    }

    /// 64-bit addresses only where a tensor needs them.
    pub fn address_type(&self) -> AddressType {
        let largest = self.views().map(TensorView::extent).into_iter().max();
        AddressType::from_len(largest.unwrap_or(0))
    }

    /// Widest vector, up to `widest` elements, that every row can be read with.
    pub fn vector_width(&self, widest: usize) -> usize {
        let fits = |width| self.views().iter().all(|view| view.fits_width(width));
        [widest, 4, 2].into_iter().find(|&width| width <= widest && fits(width)).unwrap_or(1)
    }
}

/// The storage type of `f32`.
pub fn f32_type() -> StorageType {
    FloatKind::F32.into()
}

/// The storage type of `f16`.
pub fn half_type() -> StorageType {
    FloatKind::F16.into()
}

/// The storage type of `bf16`.
pub fn bf16_type() -> StorageType {
    FloatKind::BF16.into()
}

/// A one-dimensional device buffer as a kernel argument.
pub(crate) fn array<R: Runtime>(handle: &Handle, len: usize) -> ArrayArg<R> {
    // SAFETY: every caller passes the length that the buffer was allocated with.
    unsafe { ArrayArg::from_raw_parts(handle.clone(), len) }
}

/// A grid of at least `cubes` cubes that respects the 65,535 cubes of a dimension.
pub(crate) fn grid(cubes: usize) -> CubeCount {
    const ROW: usize = 32_768;
    if cubes <= ROW {
        CubeCount::Static(cubes as u32, 1, 1)
    } else {
        CubeCount::Static(ROW as u32, cubes.div_ceil(ROW) as u32, 1)
    }
}
