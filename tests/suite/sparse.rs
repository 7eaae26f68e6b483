//! SampleAttention through the public API of every backend: golden plans and outputs, the plain reference,
//! gradients.

use std::path::Path;

use burn::tensor::{DType, Distribution, Tensor, TensorData, backend::Backend};
use long_context_tests::max_difference;
use safetensors::SafeTensors;
use sample_attention::{
    AttentionBackend, Error, Preset, Rule, SampleAttentionConfig, SampleAttentionOptions, plain,
    sample_attention, sample_attention_with_plan, sample_attention_with_report,
};

const SMALL_CASES: [&str; 6] =
    ["block64", "chunk", "no-stripes-needed", "paper-total", "residual", "short-dense"];

fn golden<B: AttentionBackend>(cases: &[&str]) {
    let device = B::Device::default();
    for case in cases {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/sample-attention").join(case);
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(folder.join("golden.json")).unwrap()).unwrap();
        let options: SampleAttentionOptions = serde_json::from_value(json["config"].clone()).unwrap();
        let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let values = |name: &str| -> Vec<f32> {
            let words = tensors.tensor(name).unwrap().data().to_vec();
            words.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
        };
        let input = |name: &str| {
            let shape: [usize; 4] = tensors.tensor(name).unwrap().shape().try_into().unwrap();
            Tensor::<B, 4>::from_data(TensorData::new(values(name), shape), &device)
        };
        let found = sample_attention_with_plan(input("q"), input("k"), input("v"), &options).unwrap();
        let compare = |name: &str, found: Vec<f32>| {
            let difference = max_difference(&found, &values(name));
            assert!(difference < 1e-4, "{case}: {name} differs by {difference}");
        };
        compare("out", found.output.into_data().into_vec().unwrap());
        compare("lse", found.lse.into_data().into_vec().unwrap());
        let counts = tensors.tensor("stripe_count").unwrap().data().to_vec();
        let counts: Vec<usize> = counts
            .chunks_exact(4)
            .map(|word| i32::from_le_bytes(word.try_into().unwrap()) as usize)
            .collect();
        match found.plan {
            None => assert!(counts.iter().all(|&count| count == 0), "{case}"),
            Some(plan) => {
                let report = plan.report().unwrap();
                let stripes: Vec<usize> = report.heads.iter().map(|head| head.stripes).collect();
                assert_eq!(stripes, counts, "{case}: stripes");
                compare("density", report.heads.iter().map(|head| head.density).collect());
                compare("recall", report.heads.iter().map(|head| head.recall_mean).collect());
            }
        }
    }
}

/// Options under which short inputs are sparse.
fn short(rule: Rule) -> SampleAttentionOptions {
    SampleAttentionOptions {
        rule,
        alpha: 0.7,
        threshold: 2.0,
        min_rows: 16,
        window_ratio: 0.05,
        block_size: 32,
        tail_rows: 20,
        dense_below: 0,
        dense_cost: None,
        ..Default::default()
    }
}

/// q, k and v with columns that many rows look at.
fn inputs<B: Backend>(
    batch: usize,
    [heads, kv_heads]: [usize; 2],
    [rows, keys]: [usize; 2],
) -> [Tensor<B, 4>; 3] {
    let device = B::Device::default();
    let random = |heads, length| {
        Tensor::<B, 4>::random(
            [batch, heads, length, 32],
            Distribution::Normal(0.0, 1.0),
            (&device, DType::F32),
        )
    };
    let pull = (0..keys).map(|key| if key % 23 == 5 { 1.2f32 } else { 0.0 }).collect::<Vec<_>>();
    let pull = Tensor::<B, 1>::from_data(TensorData::new(pull, [keys]), &device).reshape([1, 1, keys, 1]);
    [random(heads, rows).add_scalar(0.4), random(kv_heads, keys) + pull, random(kv_heads, keys)]
}

fn like_the_plain_reference<B: AttentionBackend>() {
    B::seed(&Default::default(), 7);
    for (batch, heads, lengths) in [(1, [4, 2], [300, 300]), (2, [3, 3], [130, 333]), (1, [4, 1], [257, 400])]
    {
        for rule in [Rule::Total, Rule::Residual, Rule::Joint, Rule::Contribution] {
            let [q, k, v] = inputs::<B>(batch, heads, lengths);
            let options = short(rule);
            let (found, report) =
                sample_attention_with_report(q.clone(), k.clone(), v.clone(), &options).unwrap();
            assert!(report.density() < 0.95, "{report}");
            for head in report.heads.iter().filter(|_| rule != Rule::Contribution) {
                assert!(head.recall_mean > 0.6999, "{rule:?}: {report}");
            }
            if rule == Rule::Joint {
                // The reference searches every threshold, the backends a ladder of them.
                continue;
            }
            let expected = plain::sample_attention(q, k, v, &options).unwrap();
            let values = |tensor: Tensor<B, 4>| tensor.into_data().into_vec::<f32>().unwrap();
            let difference = max_difference(&values(found), &values(expected));
            assert!(difference < 1e-5, "{heads:?}, {lengths:?}, {rule:?}: {difference}");
        }
    }
}

/// Gradients of q, k and v for one of the output, by the operator or by the plain reference.
#[cfg(feature = "flex")]
fn gradients_of<B: AttentionBackend>(
    tensors: &[TensorData; 3],
    weight: &TensorData,
    options: &SampleAttentionOptions,
    plain: bool,
) -> [Vec<f32>; 3] {
    use burn::backend::Autodiff;
    let device = B::Device::default();
    let upload = |data: &TensorData| Tensor::<Autodiff<B>, 4>::from_data(data.clone(), &device);
    let [q, k, v] = [0, 1, 2].map(|index| upload(&tensors[index]).require_grad());
    let output = if plain {
        plain::sample_attention(q.clone(), k.clone(), v.clone(), options).unwrap()
    } else {
        sample_attention(q.clone(), k.clone(), v.clone(), options)
    };
    let grads = (output * upload(weight)).sum().backward();
    [q, k, v].map(|tensor| tensor.grad(&grads).unwrap().into_data().into_vec().unwrap())
}

/// The plain reference runs on Flex: its products of ragged lengths may be wrong on Vulkan (see `gradient::padded`).
#[cfg(feature = "flex")]
fn gradients<B: AttentionBackend>(tolerance: f64) {
    use burn::backend::Flex;
    Flex::seed(&Default::default(), 11);
    for (lengths, rule) in [
        ([600, 600], None),
        ([150, 400], None),
        ([300, 300], Some(Rule::Residual)),
        ([130, 333], Some(Rule::Total)),
    ] {
        let options = rule.map_or(Preset::Dense.options(), short);
        let tensors = inputs::<Flex>(2, [4, 2], lengths);
        let weight = Tensor::<Flex, 4>::random(tensors[0].dims(), Distribution::Default, &Default::default());
        let (tensors, weight) = (tensors.map(Tensor::into_data), weight.into_data());
        let found = gradients_of::<B>(&tensors, &weight, &options, false);
        let expected = gradients_of::<Flex>(&tensors, &weight, &options, true);
        for ((name, found), expected) in ["q", "k", "v"].into_iter().zip(found).zip(expected) {
            let difference = max_difference(&found, &expected);
            assert!(
                difference < tolerance,
                "{lengths:?}, {rule:?}: gradient of {name} differs by {difference}"
            );
        }
    }
}

#[test]
#[cfg(feature = "flex")]
fn golden_plans_and_outputs_on_flex_and_ndarray() {
    let all = [&SMALL_CASES[..], &["batch-wide"]].concat();
    golden::<burn::backend::Flex>(&all);
    golden::<burn::backend::NdArray>(&all);
}

#[test]
#[cfg(feature = "vulkan")]
fn golden_plans_and_outputs_on_vulkan() {
    golden::<burn::backend::Vulkan>(&SMALL_CASES);
}

#[test]
#[cfg(feature = "cuda")]
fn golden_plans_and_outputs_on_cuda() {
    golden::<burn::backend::Cuda>(&[&SMALL_CASES[..], &["batch-wide"]].concat());
}

#[test]
#[cfg(feature = "flex")]
fn random_problems_are_like_the_plain_reference() {
    like_the_plain_reference::<burn::backend::Flex>();
}

#[test]
#[cfg(feature = "vulkan")]
fn random_problems_are_like_the_plain_reference_on_vulkan() {
    like_the_plain_reference::<burn::backend::Vulkan>();
}

#[test]
#[cfg(feature = "flex")]
fn gradients_are_those_of_the_plain_reference() {
    gradients::<burn::backend::Flex>(1e-4);
}

#[test]
#[cfg(all(feature = "flex", feature = "vulkan"))]
fn gradients_are_those_of_the_plain_reference_on_vulkan() {
    gradients::<burn::backend::Vulkan>(1e-4);
}

#[test]
#[cfg(feature = "flex")]
fn the_module_is_the_same_in_chunks_and_packed() {
    use burn::backend::Flex;
    let device = Default::default();
    let attention = SampleAttentionConfig::new(96, 6).with_kv_heads(Some(2)).with_preset(Preset::Dense);
    let attention = attention.init::<Flex>(&device);
    let x = Tensor::<Flex, 3>::random([1, 70, 96], Distribution::Default, &device);
    let whole = attention.forward(x.clone());
    let mut cache = attention.cache(1, 70);
    let chunks = [(0, 33), (33, 36), (69, 1)]
        .map(|(first, length)| attention.forward_cache(x.clone().narrow(1, first, length), &mut cache));
    let values = |tensor: Tensor<Flex, 3>| tensor.into_data().into_vec::<f32>().unwrap();
    assert!(max_difference(&values(Tensor::cat(chunks.to_vec(), 1)), &values(whole)) < 1e-5);

    let packed = attention.forward_packed(x.clone().squeeze_dim(0), &[30, 0, 40]);
    let second = attention.forward(x.narrow(1, 30, 40));
    assert!(max_difference(&values(packed.narrow(0, 30, 40).unsqueeze()), &values(second)) < 1e-5);
}

#[test]
#[cfg(feature = "flex")]
fn what_does_not_fit_is_named() {
    use burn::backend::Flex;
    let refused = |shapes: [[usize; 4]; 3], options: SampleAttentionOptions| -> String {
        let [q, k, v] = shapes.map(|shape| Tensor::<Flex, 4>::zeros(shape, &Default::default()));
        sample_attention_with_plan(q, k, v, &options)
            .err()
            .map_or(String::new(), |error: Error| error.to_string())
    };
    let good = [[1, 4, 8, 32], [1, 2, 8, 32], [1, 2, 8, 32]];
    let with = |change: fn(&mut [[usize; 4]; 3])| {
        let mut shapes = good;
        change(&mut shapes);
        refused(shapes, Default::default())
    };
    let option = |options| refused(good, options);
    assert_eq!(refused(good, Default::default()), "");
    for (found, expected) in [
        (with(|shapes| shapes[0][1] = 3), "tensor `q`: heads is 3, expected a multiple of the 2 kv heads"),
        (with(|shapes| shapes[0][2] = 9), "tensor `q`: length is 9, expected at most the key length 8"),
        (with(|shapes| shapes[0][2] = 0), "tensor `q`: length is 0, expected at least 1"),
        (with(|shapes| shapes[0][3] = 0), "tensor `q`: head_dim is 0, expected at least 1"),
        (with(|shapes| shapes[1][3] = 16), "tensor `k`: shape is [1, 2, 8, 16], expected [1, 2, 8, 32]"),
        (with(|shapes| shapes[2][2] = 7), "tensor `v`: shape is [1, 2, 7, 32], expected [1, 2, 8, 32]"),
        (
            option(SampleAttentionOptions { alpha: 1.5, ..Default::default() }),
            "option `alpha` is 1.5, expected a number in (0, 1]",
        ),
        (
            option(SampleAttentionOptions { window_ratio: -0.1, ..Default::default() }),
            "option `window_ratio` is -0.1, expected a number in [0, 1]",
        ),
    ] {
        assert_eq!(found, expected);
    }
    let heads = SampleAttentionConfig::new(100, 3).validate().unwrap_err().to_string();
    assert_eq!(heads, "n_heads: found 3, expected a divisor of d_model (100)");
    let groups = SampleAttentionConfig::new(96, 3).with_kv_heads(Some(2)).validate().unwrap_err().to_string();
    assert_eq!(groups, "kv_heads: found 2, expected a divisor of n_heads (3)");
}
