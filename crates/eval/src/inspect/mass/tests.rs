use super::*;
use burn::tensor::TensorData;
use long_context::cache::Observation;
use sample_attention_plan::reference::Mask;

const TOKENS: usize = 80;
const WIDTH: usize = 16;
const HEADS: usize = 2;

fn values(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1000) as f32 / 250.0 - 2.0).collect()
}

fn observation(start: usize, length: usize, plan: HostPlan) -> Observation {
    // Two query heads share one key head; rows of a chunk are the last of the keys.
    let q: Vec<f32> = (0..HEADS)
        .flat_map(|head| values(TOKENS * WIDTH, head)[start * WIDTH..][..length * WIDTH].to_vec())
        .collect();
    let k = values(TOKENS * WIDTH, 5)[..(start + length) * WIDTH].to_vec();
    Observation {
        layer: 3,
        start,
        q: TensorData::new(q, [1, HEADS, length, WIDTH]),
        k: TensorData::new(k.clone(), [1, 1, start + length, WIDTH]),
        v: TensorData::new(k, [1, 1, start + length, WIDTH]),
        plans: Some(vec![plan; HEADS]),
    }
}

fn options() -> SampleAttentionOptions {
    SampleAttentionOptions { block_size: 16, tail_rows: 16, ..Default::default() }
}

fn plan() -> HostPlan {
    let mut bands = vec![false; TOKENS / 16];
    bands[0] = true;
    bands[2] = true;
    HostPlan { dense: false, bands, stripes: vec![3, 17, 40], density: 0.5 }
}

fn collected(rows: usize, cells: usize, seen: &[Observation]) -> Vec<HeadMass> {
    let mut collector = Collector::new(TOKENS, Grid::new(TOKENS, 16, cells, 4), options(), rows);
    for seen in seen {
        collector.add(seen).unwrap();
    }
    collector.into_heads()
}

#[test]
fn mass_is_kept_or_lost_as_the_mask_says() {
    let heads = collected(16, 20, &[observation(0, TOKENS, plan())]);
    assert_eq!(heads.len(), HEADS);
    let shape =
        AttentionShape { batch: 1, q_heads: 2, kv_heads: 1, q_len: TOKENS, kv_len: TOKENS, head_dim: WIDTH };
    let (options, plan) = (options(), plan());
    let mask = Mask::new(&shape, &options, &plan);
    for (index, head) in heads.iter().enumerate() {
        let (q, k) = (values(TOKENS * WIDTH, index), values(TOKENS * WIDTH, 5));
        let (mut lost, mut worst, mut pairs) = (0.0f64, 1.0f64, [0; 2]);
        for row in 0..TOKENS {
            let score = |key: usize| -> f64 {
                let products = q[row * WIDTH..][..WIDTH].iter().zip(&k[key * WIDTH..][..WIDTH]);
                products.map(|(a, b)| f64::from(a * b)).sum::<f64>() / 4.0
            };
            let sum: f64 = (0..=row).map(|key| score(key).exp()).sum();
            let missed: f64 =
                (0..=row).filter(|&key| !mask.keeps(row, key)).map(|key| score(key).exp() / sum).sum();
            lost += missed;
            worst = worst.min(1.0 - missed);
            pairs[0] += row + 1;
            pairs[1] += (0..=row).filter(|&key| mask.keeps(row, key)).count();
        }
        assert_eq!(head.rows, TOKENS);
        assert!((head.recall() - (1.0 - lost / TOKENS as f64)).abs() < 1e-5, "{}", head.recall());
        assert!((f64::from(head.worst.0) - worst).abs() < 1e-5, "{:?}, expected {worst}", head.worst);
        let mass: f32 = head.mass.iter().sum();
        assert!((mass - TOKENS as f32).abs() < 1e-3, "{mass}");
        let by_key: f32 = head.lost_by_key.iter().sum();
        assert!((f64::from(by_key) - lost).abs() < 1e-3, "{by_key}, expected {lost}");
        let counted = head.pairs.iter().fold([0; 2], |sum, pair| [sum[0] + pair[0], sum[1] + pair[1]]);
        assert_eq!(counted.map(|count| count as usize), pairs);
    }
}

#[test]
fn chunks_add_up_to_the_whole() {
    let dense = || HostPlan::dense(TOKENS / 16);
    let whole = collected(16, 20, &[observation(0, TOKENS, dense())]);
    let parts = collected(16, 20, &[observation(0, 32, HostPlan::dense(2)), observation(32, 48, dense())]);
    for (whole, parts) in whole.iter().zip(&parts) {
        assert_eq!((whole.rows, parts.recall()), (parts.rows, 1.0));
        let difference = whole.mass.iter().zip(&parts.mass).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 1e-4, "{difference}");
    }
}

#[test]
fn few_rows_stand_for_a_block() {
    let heads = collected(4, 5, &[observation(0, TOKENS, plan())]);
    assert_eq!(heads[0].rows_of_cell, [4; 5]);
    assert!((heads[0].density() - 0.5).abs() < 1e-9);
    assert_eq!((heads[0].stripes, heads[0].bands), (3, (2, 5)));
}

#[test]
fn a_grid_covers_a_prompt_with_blocks_or_parts_of_them() {
    assert_eq!(Grid::new(8192, 128, 96, 16), Grid { size: 128, cells: 64 });
    assert_eq!(Grid::new(20_000, 128, 96, 16), Grid { size: 256, cells: 79 });
    assert_eq!(Grid::new(1000, 128, 96, 16), Grid { size: 16, cells: 63 });
    assert_eq!(Grid::new(1000, 128, 96, 40), Grid { size: 64, cells: 16 });
    assert_eq!(Grid::new(5, 128, 96, 128), Grid { size: 128, cells: 1 });
}
