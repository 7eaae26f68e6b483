//! Tile products and the exponential of attention on the processor.

/// Turns scores into weights relative to the largest so far; what earlier results must be multiplied by.
#[inline(always)]
pub(super) fn online_softmax(scores: &mut [f32], max: &mut f32, sum: &mut f32) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [*max; LANES];
    let mut chunks = scores.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &score) in lanes.iter_mut().zip(chunk) {
            *lane = if score > *lane { score } else { *lane };
        }
    }
    let highest = lanes.iter().chain(chunks.remainder()).fold(*max, |max, &score| max.max(score));
    if highest == f32::NEG_INFINITY {
        return 1.0;
    }
    let rescale = if *max == f32::NEG_INFINITY { 0.0 } else { (*max - highest).exp() };
    *max = highest;

    let mut lanes = [0.0; LANES];
    let mut chunks = scores.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (lane, score) in lanes.iter_mut().zip(chunk) {
            *score = exp(*score - highest);
            *lane += *score;
        }
    }
    let mut rest = 0.0;
    for score in chunks.into_remainder() {
        *score = exp(*score - highest);
        rest += *score;
    }
    *sum = *sum * rescale + lanes.iter().sum::<f32>() + rest;
    rescale
}

/// `e^x` for `x <= 0` to two units in the last place, in operations that compilers turn into vectors;
/// NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding and taking away 1.5 · 2^23 rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    // ln 2 in two parts: the first has few digits, so that n times it is exact.
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let e = p * r * r + r + 1.0;
    let scale = f32::from_bits((n as i32).wrapping_add(127).wrapping_shl(23) as u32);
    if x < -87.0 { 0.0 } else { e * scale }
}

/// `dst = scale · lhs · rhs`, or added to it; each operand with its row and column stride.
#[allow(clippy::too_many_arguments, reason = "a matrix product has this many parts")]
pub(super) fn product(
    m: usize,
    n: usize,
    k: usize,
    dst: &mut [f32],
    dst_stride: usize,
    add: bool,
    (lhs, lhs_row, lhs_column): (&[f32], usize, usize),
    (rhs, rhs_row, rhs_column): (&[f32], usize, usize),
    scale: f32,
) {
    let reach = |rows: usize, columns: usize, row: usize, column: usize| {
        (rows - 1) * row + (columns - 1) * column + 1
    };
    assert!(dst.len() >= reach(m, n, dst_stride, 1));
    assert!(lhs.len() >= reach(m, k, lhs_row, lhs_column));
    assert!(rhs.len() >= reach(k, n, rhs_row, rhs_column));
    // SAFETY: the three regions were just checked to hold every element that these sizes and strides reach,
    // and `dst` is borrowed alone.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            dst_stride as isize,
            add,
            lhs.as_ptr(),
            lhs_column as isize,
            lhs_row as isize,
            rhs.as_ptr(),
            rhs_column as isize,
            rhs_row as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_close_to_the_real_one() {
        let mut worst = 0.0f64;
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let expected = (x as f64).exp();
            worst = worst.max((exp(x) as f64 - expected).abs() / expected);
        }
        assert!(worst < 3e-7, "relative error {worst}");
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }
}
