use burn::tensor::{Tensor, backend::Backend};

/// Puts the heads of each position side by side.
///
/// # Shapes
///
/// - x: `[batch, heads, length, head_dim]`
/// - output: `[batch, length, heads * head_dim]`
pub fn merge_heads<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 3> {
    let [batch, heads, length, head_dim] = x.dims();
    // One position is in order as it is; swapping its dimensions would only cost a copy.
    let x = if length == 1 { x } else { x.swap_dims(1, 2) };
    x.reshape([batch, length, heads * head_dim])
}
