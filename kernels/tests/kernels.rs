//! The kernels on a wgpu adapter (a software one will do) against the golden cases and against the
//! `f64` reference.
#![cfg(feature = "wgpu")]

#[path = "common/mod.rs"]
mod common;
mod layers;

use std::{fs, path::PathBuf};

use common::{assert_passes, client, close, fresh_rng, options, read, run, shape, upload, upload_problem};
use sample_attention_kernels::{
    AttentionShape, Error, HostPlan, Rule, SampleAttentionOptions, Stage, TensorView, TileProduct, bf16_type,
    decode, dense_attention, f32_type, half_type, planned_attention, reference, sample_attention,
    sample_plan,
    selftest::{GoldenCase, PlanCheck, Problem},
    time_stages, to_bytes,
};

const RULES: [Rule; 4] = [Rule::Total, Rule::Residual, Rule::Joint, Rule::Contribution];

#[test]
fn golden_plans_and_outputs() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/sample-attention");
    let mut folders: Vec<PathBuf> =
        fs::read_dir(&folder).expect("golden cases").map(|entry| entry.expect("an entry").path()).collect();
    folders.sort();
    assert!(!folders.is_empty(), "no golden cases in {}", folder.display());
    for folder in folders {
        let case = GoldenCase::load(&folder).expect("a golden case");
        let row = case.check(&client()).expect("a valid call");
        assert!(row.passed, "{row:?}");
        assert!(matches!(row.plan, PlanCheck::Equal | PlanCheck::Dense), "{row:?}");
    }
}

/// Shapes with partial tiles, unaligned offsets, odd head sizes and every kind of grouping.
fn shapes() -> Vec<AttentionShape> {
    vec![
        shape((1, 2, 1), (500, 500), 32),
        shape((2, 3, 3), (130, 333), 16),
        shape((1, 4, 2), (201, 777), 48),
        shape((1, 1, 1), (300, 300), 256),
        shape((1, 2, 2), (1, 200), 80),
        shape((1, 1, 1), (33, 33), 64),
    ]
}

#[test]
fn window_rules_match_the_reference() {
    let (client, mut rng) = (client(), fresh_rng());
    for shape in shapes() {
        for rule in [Rule::Total, Rule::Residual] {
            let problem = Problem::random(shape, &mut rng);
            assert_passes(&client, &problem, f32_type(), &options(rule));
        }
    }
}

#[test]
fn contribution_keeps_what_the_reference_keeps() {
    let (client, mut rng) = (client(), fresh_rng());
    for shape in shapes().into_iter().chain([shape((1, 6, 2), (1000, 1000), 32)]) {
        for (threshold, block_size) in [(1.0, 64), (0.3, 16), (4.0, 32)] {
            let options = SampleAttentionOptions { threshold, block_size, ..options(Rule::Contribution) };
            let problem = Problem::random(shape, &mut rng);
            assert_passes(&client, &problem, f32_type(), &options);
        }
    }
}

/// Values that say nothing of what matters, since they are all the same or not finite, leave bands or everything.
#[test]
fn contribution_of_values_without_distances() {
    let (client, mut rng) = (client(), fresh_rng());
    let options = options(Rule::Contribution);
    let mut problem = Problem::random(shape((1, 2, 2), (300, 300), 16), &mut rng);
    for (poison, expects_dense) in [(f32::NAN, true), (f32::INFINITY, true), (2.0, false)] {
        match expects_dense {
            true => problem.v[100 * 16] = poison,
            false => problem.v.fill(poison),
        }
        let found = run(&client, &problem, &options);
        assert!(found.plans.iter().all(|plan| plan.dense == expects_dense), "{poison}");
        assert!(found.plans.iter().all(|plan| plan.stripes.is_empty()), "{poison}");
    }
}

#[test]
fn joint_reaches_alpha_at_the_density_of_an_exhaustive_search() {
    let (client, mut rng) = (client(), fresh_rng());
    for (shape, alpha, block_size) in [
        (shape((1, 3, 1), (1000, 1000), 32), 0.9, 32),
        (shape((1, 2, 2), (500, 1200), 16), 0.8, 32),
        (shape((2, 1, 1), (1500, 1500), 16), 0.95, 32),
        (shape((1, 3, 1), (900, 1800), 16), 0.98, 16),
    ] {
        let options = SampleAttentionOptions { alpha, block_size, ..options(Rule::Joint) };
        let problem = Problem::random(shape, &mut rng);
        assert_passes(&client, &problem, f32_type(), &options);
    }
}

/// Every head size, in attention over a plan, over all keys, and with the keys split.
#[test]
fn all_head_sizes_match_the_reference() {
    let (client, mut rng) = (client(), fresh_rng());
    for head_dim in (16..=256).step_by(16) {
        let sparse = SampleAttentionOptions { block_size: 32, ..options(Rule::Residual) };
        let dense = SampleAttentionOptions { dense_below: usize::MAX, ..sparse };
        let split = SampleAttentionOptions { product: TileProduct::Auto, ..dense };
        let problem = Problem::random(shape((1, 2, 1), (90, 150), head_dim), &mut rng);
        assert_passes(&client, &problem, f32_type(), &sparse);
        assert_passes(&client, &problem, f32_type(), &dense);
        let problem = Problem::random(shape((1, 2, 1), (2, 100), head_dim), &mut rng);
        assert_passes(&client, &problem, f32_type(), &split);
    }
}

#[test]
fn recall_is_that_of_the_reference() {
    let (client, mut rng) = (client(), fresh_rng());
    for rule in RULES {
        let options = options(rule);
        let problem = Problem::random(shape((1, 2, 1), (600, 700), 32), &mut rng);
        let found = run(&client, &problem, &options);
        let expected = reference::plans(&problem.shape, &options, &problem.q, &problem.k, &problem.v);
        for (head, expected) in expected.iter().enumerate() {
            if found.plans[head].stripes == expected.plan.stripes {
                let (mean, least) = (f64::from(found.recall[head]), f64::from(found.recall_min[head]));
                assert!((mean - expected.recall_mean).abs() < 1e-5, "{rule:?}: mean recall {mean}");
                assert!((least - expected.recall_min).abs() < 1e-5, "{rule:?}: least recall {least}");
            }
        }
    }
}

#[test]
fn dense_attention_matches_the_reference() {
    let (client, mut rng) = (client(), fresh_rng());
    let problem = Problem::random(shape((2, 2, 1), (150, 210), 32), &mut rng);
    let all = SampleAttentionOptions { dense_below: 210, ..options(Rule::Residual) };
    assert_passes(&client, &problem, f32_type(), &all);
    let expected = run(&client, &problem, &all);

    let [q, k, v] = upload_problem(&client, &problem);
    let out = upload(&client, &vec![f32::NAN; problem.q.len()], q.shape);
    let lse = dense_attention(&client, &q, &k, &v, &out, None, TileProduct::Auto).expect("a valid call");
    close("out", &read(&client, &out.handle), &expected.out, 1e-5);
    close("lse", &read(&client, &lse), &expected.lse, 1e-5);
}

/// A few queries: the keys are split, and heads of a group share them.
#[test]
fn decode_matches_the_reference() {
    let (client, mut rng) = (client(), fresh_rng());
    for shape in [
        shape((1, 2, 2), (1, 1000), 64),
        shape((2, 16, 1), (1, 333), 32),
        shape((1, 6, 2), (5, 130), 80),
        shape((1, 20, 1), (3, 70), 256),
        shape((1, 1, 1), (1, 1), 16),
        shape((1, 3, 1), (16, 16), 16),
    ] {
        let problem = Problem::random(shape, &mut rng);
        let [q, k, v] = upload_problem(&client, &problem);
        let out = upload(&client, &vec![f32::NAN; problem.q.len()], q.shape);
        let lse = decode(&client, &q, &k, &v, &out, None).expect("a valid call");
        let options = options(Rule::Residual);
        let plans = vec![HostPlan::dense(shape.blocks(&options)); shape.heads()];
        let expected = reference::attention(&shape, &options, &problem.q, &problem.k, &problem.v, &plans);
        let to_f32 = |data: Vec<f64>| data.into_iter().map(|x| x as f32).collect::<Vec<_>>();
        close("out", &read(&client, &out.handle), &to_f32(expected.out), 1e-5);
        close("lse", &read(&client, &lse), &to_f32(expected.lse), 1e-5);
    }
}

#[test]
fn costly_plans_become_dense() {
    let (client, mut rng) = (client(), fresh_rng());
    let problem = Problem::random(shape((1, 2, 1), (400, 400), 16), &mut rng);
    for rule in RULES {
        let options = SampleAttentionOptions { alpha: 0.999, dense_cost: Some(0.3), ..options(rule) };
        let found = run(&client, &problem, &options);
        let all = HostPlan::dense(problem.shape.blocks(&options));
        assert_eq!(found.plans, vec![all.clone(), all], "{rule:?}");
        let dense = SampleAttentionOptions { dense_below: usize::MAX, ..options };
        close("out", &found.out, &run(&client, &problem, &dense).out, 1e-5);
    }
}

/// Plan and attention apart, and stage by stage, give what the whole call gives.
#[test]
fn stages_add_up_to_the_whole() {
    let (client, mut rng) = (client(), fresh_rng());
    let problem = Problem::random(shape((1, 2, 1), (300, 420), 32), &mut rng);
    let [q, k, v] = upload_problem(&client, &problem);
    for rule in RULES {
        let options = options(rule);
        let expected = run(&client, &problem, &options);
        let out = upload(&client, &vec![f32::NAN; problem.q.len()], q.shape);
        let plan = sample_plan(&client, &q, &k, &v, &options).expect("a valid call").expect("a plan");
        planned_attention(&client, &q, &k, &v, &out, &plan, &options).expect("a valid call");
        assert_eq!(read(&client, &out.handle), expected.out, "{rule:?}");

        let times = time_stages(&client, [&q, &k, &v, &out], &options).expect("a valid call");
        let stages: Vec<Stage> = times.stages.iter().map(|&(stage, _)| stage).collect();
        let bands = matches!(rule, Rule::Joint | Rule::Contribution).then_some(Stage::Bands);
        let all =
            [Some(Stage::Rows), bands, Some(Stage::Columns), Some(Stage::Filter), Some(Stage::Attention)];
        assert_eq!(stages, all.into_iter().flatten().collect::<Vec<_>>());

        let other = SampleAttentionOptions { block_size: 32, ..options };
        let error = planned_attention(&client, &q, &k, &v, &out, &plan, &other).expect_err("another plan");
        assert!(error.to_string().contains("plan"), "{error}");
    }
}

/// Half types: inputs rounded to the type, then the same comparison.
#[test]
fn half_types_match_the_reference() {
    let (client, mut rng) = (client(), fresh_rng());
    for dtype in [half_type(), bf16_type()] {
        if !client.properties().supports_type(dtype) {
            println!("{dtype} is not supported here");
            continue;
        }
        for rule in RULES {
            let mut problem = Problem::random(shape((1, 2, 1), (400, 400), 64), &mut rng);
            problem.round(dtype);
            assert_passes(&client, &problem, dtype, &options(rule));
        }
        let split = SampleAttentionOptions { product: TileProduct::Auto, ..options(Rule::Residual) };
        let mut problem = Problem::random(shape((1, 4, 2), (1, 300), 64), &mut rng);
        problem.round(dtype);
        assert_passes(&client, &problem, dtype, &split);
    }
}

/// What the device lacks is refused, not replaced, when it is asked for.
#[test]
fn missing_products_are_refused() {
    let client = client();
    let tensor = upload(&client, &[0.0; 16], [1, 1, 1, 16]);
    for product in [TileProduct::Cmma, TileProduct::Mma] {
        let error = dense_attention(&client, &tensor, &tensor, &tensor, &tensor, None, product);
        let error = error.expect_err("no such products of f32").to_string();
        assert!(error.contains(&product.to_string()), "{error}");
    }
}

/// Options as files hold them.
#[test]
fn options_deserialize() {
    let parse = |json: &str| serde_json::from_str::<SampleAttentionOptions>(json);
    let found = parse(r#"{"coverage": "joint", "alpha": 0.9, "dense_cost": null}"#).expect("options");
    let expected = SampleAttentionOptions {
        rule: Rule::Joint,
        alpha: 0.9,
        dense_cost: None,
        ..SampleAttentionOptions::default()
    };
    assert_eq!(found, expected);
    let error = parse(r#"{"alhpa": 0.9}"#).expect_err("an unknown field").to_string();
    assert!(error.contains("alhpa"), "{error}");
}

/// Permuted tensors `[batch, length, heads, dim]`, and a slice of a longer cache whose rows are
/// not aligned to vectors.
#[test]
fn strided_views_give_the_same_result() {
    let (client, mut rng) = (client(), fresh_rng());
    let shape = shape((2, 2, 1), (70, 180), 16);
    let options = options(Rule::Residual);
    let problem = Problem::random(shape, &mut rng);
    let expected = run(&client, &problem, &options);
    for padding in [0, 4, 3] {
        let strided = |data: &[f32], [batch, heads, length, dim]: [usize; 4]| {
            let pitch = heads * dim + padding;
            let capacity = length + 5;
            let mut memory = vec![f32::NAN; batch * capacity * pitch];
            for (row, values) in data.chunks(dim).enumerate() {
                let (sequence, head, at) = (row / length / heads, row / length % heads, row % length);
                let start = (sequence * capacity + at) * pitch + head * dim;
                memory[start..][..dim].copy_from_slice(values);
            }
            let handle = client.create_from_slice(&to_bytes(&memory, f32_type()));
            let strides = [capacity * pitch, dim, pitch, 1];
            TensorView::new(handle, [batch, heads, length, dim], strides, f32_type())
        };
        let [q, k, v] = upload_problem(&client, &problem);
        let out = strided(&vec![f32::NAN; problem.q.len()], q.shape);
        sample_attention(
            &client,
            &strided(&problem.q, q.shape),
            &strided(&problem.k, k.shape),
            &strided(&problem.v, v.shape),
            &out,
            &options,
        )
        .expect("a valid call");
        let memory = read(&client, &out.handle);
        let [batch, heads, length, dim] = out.shape;
        let mut found = Vec::new();
        for row in 0..batch * heads * length {
            let (sequence, head, at) = (row / length / heads, row / length % heads, row % length);
            let start = sequence * out.strides[0] + head * out.strides[1] + at * out.strides[2];
            found.extend_from_slice(&memory[start..][..dim]);
        }
        close("strided out", &found, &expected.out, 1e-5);
    }
}

#[test]
fn wrong_calls_are_refused() {
    let client = client();
    let tensor = |shape: [usize; 4]| upload(&client, &vec![0.0; shape.iter().product()], shape);
    let call = |q: [usize; 4], k: [usize; 4], v: [usize; 4], out: [usize; 4]| {
        let options = SampleAttentionOptions::default();
        sample_attention(&client, &tensor(q), &tensor(k), &tensor(v), &tensor(out), &options).err()
    };
    let (good_q, good_k) = ([1, 2, 8, 16], [1, 1, 8, 16]);
    assert_eq!(call(good_q, good_k, good_k, good_q), None);
    for (q, k, v, out, tensor, what) in [
        ([1, 2, 0, 16], good_k, good_k, [1, 2, 0, 16], "q", "length"),
        (good_q, [1, 1, 0, 16], [1, 1, 0, 16], good_q, "k", "length"),
        ([1, 2, 9, 16], good_k, good_k, [1, 2, 9, 16], "q", "length"),
        ([1, 3, 8, 16], [1, 2, 8, 16], [1, 2, 8, 16], [1, 3, 8, 16], "q", "heads"),
        (good_q, [2, 1, 8, 16], good_k, good_q, "k", "shape"),
        (good_q, good_k, [1, 1, 7, 16], good_q, "v", "shape"),
        (good_q, good_k, good_k, [1, 2, 8, 32], "out", "shape"),
        ([1, 2, 8, 24], [1, 1, 8, 24], [1, 1, 8, 24], [1, 2, 8, 24], "q", "head_dim"),
        ([1, 2, 8, 272], [1, 1, 8, 272], [1, 1, 8, 272], [1, 2, 8, 272], "q", "head_dim"),
    ] {
        match call(q, k, v, out) {
            Some(Error::Tensor { tensor: named, what: property, .. }) => {
                assert_eq!((named, property), (tensor, what));
            }
            other => panic!("expected an error about {tensor} {what}, got {other:?}"),
        }
    }

    let (q, k) = (tensor(good_q), tensor(good_k));
    let options = SampleAttentionOptions::default();
    let attempt = |k: &TensorView<_>, options: &SampleAttentionOptions| {
        sample_attention(&client, &q, k, &tensor(good_k), &tensor(good_q), options).err()
    };
    let mut bad = k.clone();
    bad.strides = [128, 128, 1, 8];
    let error = attempt(&bad, &options).expect("an error").to_string();
    assert!(error.contains("last stride"), "{error}");
    bad.strides = [128, 128, 1024, 1];
    let error = attempt(&bad, &options).expect("an error").to_string();
    assert!(error.contains("memory"), "{error}");
    bad = k.clone();
    bad.dtype = half_type();
    let error = attempt(&bad, &options).expect("an error").to_string();
    assert!(error.contains("type"), "{error}");

    let long = tensor([1, 2, 17, 16]);
    let error = decode(&client, &long, &long, &long, &long, None).expect_err("too many queries").to_string();
    assert!(error.contains("length is 17, expected at most 16"), "{error}");

    for (field, wrong) in [
        ("alpha", SampleAttentionOptions { alpha: 0.0, ..options }),
        ("alpha", SampleAttentionOptions { alpha: f64::NAN, ..options }),
        ("row_ratio", SampleAttentionOptions { row_ratio: 1.5, ..options }),
        ("window_ratio", SampleAttentionOptions { window_ratio: -0.1, ..options }),
        ("min_rows", SampleAttentionOptions { min_rows: 0, ..options }),
        ("max_rows", SampleAttentionOptions { max_rows: Some(0), ..options }),
        ("block_size", SampleAttentionOptions { block_size: 100, ..options }),
        ("dense_cost", SampleAttentionOptions { dense_cost: Some(0.0), ..options }),
        ("scale", SampleAttentionOptions { scale: Some(f64::INFINITY), ..options }),
    ] {
        match attempt(&k, &wrong) {
            Some(Error::Option { field: named, .. }) => assert_eq!(named, field),
            other => panic!("expected an error about {field}, got {other:?}"),
        }
    }
}

/// What is not finite turns its own rows to NaN, never hangs, and leaves other heads alone.
#[test]
fn values_that_are_not_finite_stay_where_they_are() {
    let (client, mut rng) = (client(), fresh_rng());
    let shape = shape((1, 2, 2), (300, 300), 16);
    let clean = Problem::random(shape, &mut rng);
    for rule in [Rule::Total, Rule::Residual, Rule::Joint] {
        let options = options(rule);
        let expected = run(&client, &clean, &options);
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut problem = clean.clone();
            // A key of the first head: every row from 10 on sees it.
            problem.k[10 * 16 + 3] = poison;
            let found = run(&client, &problem, &options);
            let second = 300 * 16;
            close("second head", &found.out[second..], &expected.out[second..], 1e-6);
            close("rows before", &found.out[..160], &expected.out[..160], 1e-5);
            if poison.is_nan() {
                assert!(found.plans[0].dense, "{rule:?}");
                assert!(found.out[160..second].iter().all(|x| x.is_nan()));
            }
        }
        // A value: it may reach rows of its own block, the second one of 64.
        let mut problem = clean.clone();
        problem.v[100 * 16] = f32::NAN;
        let found = run(&client, &problem, &options);
        assert_eq!(found.plans, expected.plans, "{rule:?}");
        let second = 300 * 16;
        close("second head", &found.out[second..], &expected.out[second..], 1e-6);
        close("rows before", &found.out[..64 * 16], &expected.out[..64 * 16], 1e-6);
        // The row itself, and the tail.
        assert!(found.out[100 * 16].is_nan() && found.out[299 * 16].is_nan());
        // A query of a row that is not sampled.
        let mut problem = clean.clone();
        problem.q[16 * 299] = f32::NAN;
        let found = run(&client, &problem, &options);
        let last = 16 * 299;
        close("rows before", &found.out[..last], &expected.out[..last], 1e-6);
        assert!(found.out[last..last + 16].iter().all(|x| x.is_nan()));
    }
}
