use cubecl::prelude::*;
use sample_attention_kernels::{
    TensorView, f32_type, from_bytes,
    layers::{Heads, Packing, Pairs, Rotate, RowsView, rotate},
    to_bytes,
};

use super::{Matrix, assert_rounded, types};
use crate::common::{Client, client, fresh_rng};

fn poisoned_view(
    client: &Client,
    shape: [usize; 4],
    dtype: StorageType,
) -> TensorView<cubecl::wgpu::WgpuRuntime> {
    let bytes = to_bytes(&vec![f32::NAN; shape.iter().product()], dtype);
    TensorView::contiguous(client.create_from_slice(&bytes), shape, dtype)
}

fn read(client: &Client, view: &TensorView<cubecl::wgpu::WgpuRuntime>) -> Vec<f64> {
    let bytes = client.read_one(view.handle.clone()).expect("readable buffer");
    from_bytes(&bytes, view.dtype).into_iter().map(f64::from).collect()
}

/// The turned head: features `2i, 2i + 1` or `i, i + half` of the first `2 half` turn.
fn turn(head: &[f64], cos: &[f64], sin: &[f64], pairs: Pairs) -> Vec<f64> {
    let half = cos.len();
    let mut turned = head.to_vec();
    for i in 0..half {
        let (a, b) = match pairs {
            Pairs::Interleaved => (2 * i, 2 * i + 1),
            Pairs::HalfSplit => (i, i + half),
        };
        turned[a] = head[a] * cos[i] - head[b] * sin[i];
        turned[b] = head[b] * cos[i] + head[a] * sin[i];
    }
    turned
}

#[test]
fn layers_rotate() {
    let (client, mut rng) = (client(), fresh_rng());
    // Batch, length, start, capacity, query heads, key/value heads, head size, pairs.
    let cases = [
        ([1, 1, 7, 9, 8, 2, 64, 16], Pairs::Interleaved, Packing::ByKind),
        ([2, 5, 0, 5, 4, 4, 32, 16], Pairs::HalfSplit, Packing::ByGroup),
        ([2, 3, 2, 11, 6, 2, 16, 8], Pairs::HalfSplit, Packing::ByGroup),
        ([1, 130, 1, 140, 3, 1, 24, 5], Pairs::Interleaved, Packing::ByGroup),
        ([3, 2, 4, 8, 4, 2, 10, 3], Pairs::HalfSplit, Packing::ByKind),
    ];
    for (dtype, step) in types(&client) {
        for (sizes, pairs, packing) in cases {
            let [batch, length, start, capacity, q_heads, kv_heads, head_dim, half] = sizes;
            let slots = q_heads + 2 * kv_heads;
            let mut random = |shape, gap, dtype| Matrix::random(&client, &mut rng, shape, gap, dtype);
            let qkv = random([batch * length, slots * head_dim], 3, dtype);
            let [cos, sin] = [0, 1].map(|_| random([length, half], 2, f32_type()));
            let q = poisoned_view(&client, [batch, q_heads, length, head_dim], dtype);
            let [keys, values] =
                [0, 1].map(|_| poisoned_view(&client, [batch, kv_heads, capacity, head_dim], dtype));
            let heads = Heads { q_heads, kv_heads, packing };
            let call = Rotate {
                qkv: &qkv.view,
                heads,
                cos: &cos.view,
                sin: &sin.view,
                pairs,
                q: &q,
                keys: &keys,
                values: &values,
                start,
            };
            rotate(&client, &call).expect("a valid call");

            let head = |batch: usize, at: usize, kind: usize, head: usize| {
                let group = q_heads / kv_heads;
                let slot = match (packing, kind) {
                    (Packing::ByKind, _) => [0, q_heads, q_heads + kv_heads][kind] + head,
                    (Packing::ByGroup, 0) => head / group * (group + 2) + head % group,
                    (Packing::ByGroup, _) => head * (group + 2) + group + kind - 1,
                };
                let values = &qkv.row(batch * length + at)[slot * head_dim..][..head_dim];
                if kind == 2 { values.to_vec() } else { turn(values, cos.row(at), sin.row(at), pairs) }
            };
            let what = format!("{dtype} {sizes:?} {pairs:?} {packing:?}");
            let slack = |values: Vec<f64>| values.into_iter().map(|x| (x, 3e-7)).collect::<Vec<_>>();
            let mut expected = Vec::new();
            for (b, h, at) in each([batch, q_heads, length]) {
                expected.extend(slack(head(b, at, 0, h)));
            }
            assert_rounded(&what, &read(&client, &q), &expected, step);
            for (kind, cache) in [(1, &keys), (2, &values)] {
                let found = read(&client, cache);
                for (b, h, position) in each([batch, kv_heads, capacity]) {
                    let found = &found[((b * kv_heads + h) * capacity + position) * head_dim..][..head_dim];
                    if (start..start + length).contains(&position) {
                        assert_rounded(&what, found, &slack(head(b, position - start, kind, h)), step);
                    } else {
                        assert!(found.iter().all(|x| x.is_nan()), "{what}: position {position} is written");
                    }
                }
            }
        }
    }
}

fn each([a, b, c]: [usize; 3]) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a).flat_map(move |i| (0..b).flat_map(move |j| (0..c).map(move |k| (i, j, k))))
}

#[test]
fn layers_rotate_refuses_what_does_not_fit() {
    let (client, dtype) = (client(), f32_type());
    let rows = |rows, width| {
        let bytes = to_bytes(&vec![0.0; rows * width], dtype);
        RowsView::contiguous(client.create_from_slice(&bytes), rows, width, dtype)
    };
    let (table, q) = (rows(2, 4), poisoned_view(&client, [1, 4, 2, 8], dtype));
    let message = |qkv: &RowsView, capacity, kv_heads, start| {
        let cache = poisoned_view(&client, [1, 2, capacity, 8], dtype);
        let heads = Heads { q_heads: 4, kv_heads, packing: Packing::ByKind };
        let (cos, sin, q, keys, values) = (&table, &table, &q, &cache, &cache);
        let pairs = Pairs::HalfSplit;
        rotate(&client, &Rotate { qkv, heads, cos, sin, pairs, q, keys, values, start })
            .unwrap_err()
            .to_string()
    };
    assert_eq!(message(&rows(2, 64), 8, 2, 7), "tensor `keys`: length is 8, expected at least 9");
    assert_eq!(message(&rows(2, 64), 8, 3, 0), "tensor `qkv`: query heads is 4, expected a multiple of 3");
    assert_eq!(message(&rows(2, 65), 8, 2, 0), "tensor `qkv`: shape is [2, 65], expected [2, 64]");
}
