//! What surrounds attention in a decoder layer, for few rows: bound by memory and by launches, so each
//! operation is one launch, and none of them takes shapes or strides through device memory (which costs a
//! copy from the host each time).

mod linear;
mod norm;
mod product;
mod rotate;
mod rows;
mod sum;

pub use linear::{Linear, MAX_LINEAR_ROWS, gated_linear, linear};
pub use norm::{RmsNorm, rms_norm};
pub use product::{MIN_PRODUCT_ROWS, gated_product, multiplies, product};
pub use rotate::{Heads, Packing, Pairs, Rotate, rotate};
pub use rows::RowsView;
