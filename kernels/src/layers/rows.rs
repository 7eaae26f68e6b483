//! Views of matrices in device memory.

use cubecl::{ir::AddressType, prelude::*, server::Handle};

use crate::{Error, bf16_type, f32_type, half_type, tensor::array};

/// Rows of contiguous elements, evenly spaced in device memory: a matrix, or one row for a vector.
#[derive(Debug, Clone)]
pub struct RowsView {
    /// The memory; its first element is the first row's first.
    pub handle: Handle,
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Elements from the start of a row to the start of the next.
    pub stride: usize,
    /// Element type: `f32`, `f16` or `bf16`.
    pub dtype: StorageType,
}

impl RowsView {
    /// Rows without a gap between them.
    pub fn contiguous(handle: Handle, rows: usize, width: usize, dtype: StorageType) -> Self {
        Self { handle, rows, width, stride: width, dtype }
    }

    /// Elements from the first to behind the last one.
    pub(super) fn extent(&self) -> usize {
        (self.rows.max(1) - 1) * self.stride + self.width
    }

    /// Whether rows can be read as vectors of `width` elements.
    pub(super) fn fits_width(&self, width: usize) -> bool {
        let offset = self.handle.offset_start.unwrap_or(0) as usize;
        self.width.is_multiple_of(width)
            && (self.rows == 1 || self.stride.is_multiple_of(width))
            && offset.is_multiple_of(width * self.dtype.size())
    }

    pub(super) fn check(
        &self,
        name: &'static str,
        [rows, width]: [usize; 2],
        dtype: StorageType,
    ) -> Result<(), Error> {
        if [self.rows, self.width] != [rows, width] {
            let found = format!("[{}, {}]", self.rows, self.width);
            return Err(Error::tensor(name, "shape", found, format!("[{rows}, {width}]")));
        }
        if self.dtype != dtype {
            return Err(Error::tensor(name, "type", self.dtype, dtype));
        }
        if self.rows > 1 && self.stride < self.width {
            return Err(Error::tensor(name, "stride", self.stride, format!("at least {width}")));
        }
        let (bytes, needed) = (self.handle.size_in_used() as usize, self.extent() * dtype.size());
        if bytes < needed {
            return Err(Error::tensor(name, "memory", bytes, format!("at least {needed} bytes")));
        }
        Ok(())
    }

    /// The whole view as an argument of elements or of vectors.
    pub(super) fn arg<R: Runtime>(&self) -> ArrayArg<R> {
        array(&self.handle, self.extent())
    }
}

/// Refuses types and sizes that no kernel takes.
pub(super) fn check_device<R: Runtime>(
    client: &ComputeClient<R>,
    views: &[&RowsView],
) -> Result<AddressType, Error> {
    let dtype = views[0].dtype;
    if ![f32_type(), half_type(), bf16_type()].contains(&dtype) {
        return Err(Error::tensor("x", "type", dtype, "f32, f16 or bf16"));
    }
    if !client.properties().supports_type(dtype) {
        return Err(Error::Unsupported(format!("tensors of {dtype}")));
    }
    if let Some(empty) = views.iter().find(|view| view.rows == 0 || view.width == 0) {
        let found = format!("[{}, {}]", empty.rows, empty.width);
        return Err(Error::tensor("x", "shape", found, "at least one row and one column"));
    }
    let address = AddressType::from_len(views.iter().map(|view| view.extent()).max().unwrap_or(0));
    if !client.properties().supports_address(address) {
        return Err(Error::Unsupported(format!("{address} addresses")));
    }
    Ok(address)
}

/// The widest vectors, up to 16 bytes, that all of these can be read with.
pub(super) fn vector_width<R: Runtime>(client: &ComputeClient<R>, views: &[&RowsView]) -> usize {
    let widest = (16 / views[0].dtype.size()).min(client.properties().hardware.max_vector_size);
    let fits = |width| views.iter().all(|view| view.fits_width(width));
    [8, 4, 2].into_iter().find(|&width| width <= widest && fits(width)).unwrap_or(1)
}
