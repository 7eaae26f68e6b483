//! The layers of every backend against Burn's own operations on the CPU.

use burn::backend::Flex;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Tensor, TensorData, TensorPrimitive};
use long_context::backend::{Heads, LayerBackend, Packing, Rotated};
use long_context_tests::max_difference;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sample_attention::rotary::{RotaryConfig, RotaryPairs};

/// What one backend made of each problem.
type Results = Vec<(String, Vec<f32>)>;

struct Problems<B: LayerBackend> {
    random: StdRng,
    device: B::Device,
    results: Results,
}

impl<B: LayerBackend> Problems<B> {
    fn draw<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<B, D> {
        let values = (0..shape.iter().product()).map(|_| self.random.random_range(-1.0f32..1.0)).collect();
        Tensor::from_data(TensorData::new::<f32, _>(values, shape), (&self.device, DType::F32))
    }

    fn primitive<const D: usize>(&mut self, shape: [usize; D]) -> FloatTensor<B> {
        self.draw(shape).into_primitive().tensor()
    }

    fn keep<const D: usize>(&mut self, name: String, primitive: FloatTensor<B>) {
        let tensor = Tensor::<B, D>::from_primitive(TensorPrimitive::Float(primitive));
        self.results.push((name, tensor.into_data().into_vec().unwrap()));
    }

    fn project(&mut self, [batch, length, inputs, outputs]: [usize; 4], bias: bool, residual: bool) {
        let [x, weight] = [self.primitive([batch, length, inputs]), self.primitive([outputs, inputs])];
        let bias = bias.then(|| self.primitive([outputs]));
        let residual = residual.then(|| self.primitive([batch, length, outputs]));
        let y = B::project(x, weight, bias, residual);
        self.keep::<3>(format!("{batch} x {length} x {inputs} x {outputs}"), y);
    }

    fn project_gated(&mut self, [batch, length, inputs, outputs]: [usize; 4], fused: bool) {
        let x = self.primitive([batch, length, inputs]);
        let gate = self.primitive([if fused { 2 * outputs } else { outputs }, inputs]);
        let up = (!fused).then(|| self.primitive([outputs, inputs]));
        let y = B::project_gated(x, gate, up);
        self.keep::<3>(format!("gated {batch} x {length} x {inputs} x {outputs}"), y);
    }

    fn rms_norm(&mut self, [batch, length, width]: [usize; 3], cast_before_weight: bool) {
        // Every second row of a wider tensor, as a slice leaves it.
        let x = self.draw([batch, length, 2, width]).narrow(2, 1, 1).squeeze_dim::<3>(2);
        let weight = self.primitive([width]);
        let y = B::rms_norm(x.into_primitive().tensor(), weight, 1e-5, cast_before_weight);
        self.keep::<3>(format!("norm {batch} x {length} x {width}"), y);
    }

    /// Writes positions after others, with the memory held by somebody else or not.
    fn rotate(&mut self, heads: Heads, pairs: RotaryPairs, [batch, start, length]: [usize; 3], shared: bool) {
        let Heads { heads: q_heads, kv_heads, head_dim, .. } = heads;
        let config = RotaryConfig { width: head_dim / 2, pairs, base: 1e4, position_divisor: 1.0 };
        let rotary = config.init(start, length, &self.device);
        let qkv = self.primitive([batch, length, (q_heads + 2 * kv_heads) * head_dim]);
        let capacity = start + length + 3;
        let memory = [0, 1].map(|_| self.draw([batch, kv_heads, capacity, head_dim]));
        let before = shared.then(|| memory.clone());
        let memory = memory.map(|memory| memory.into_primitive().tensor());
        let Rotated { q, memory, held } = B::rotate(qkv, heads, rotary, memory, start);
        let name = format!("{heads:?} {pairs:?} {batch} x {start} + {length}");
        let outputs = [q].into_iter().chain(memory).chain(held);
        for (at, output) in outputs.enumerate() {
            self.keep::<4>(format!("{name}: output {at}"), output);
        }
        for memory in before.into_iter().flatten() {
            self.keep::<4>(format!("{name}: what was there"), memory.into_primitive().tensor());
        }
    }
}

fn results<B: LayerBackend>() -> Results {
    let mut problems: Problems<B> =
        Problems { random: StdRng::seed_from_u64(5), device: Default::default(), results: Vec::new() };
    // Up to 8 rows are few.
    problems.project([1, 1, 96, 40], true, true);
    problems.project([1, 8, 33, 50], false, true);
    problems.project([2, 3, 64, 17], true, false);
    problems.project([1, 9, 64, 30], true, true);
    problems.project_gated([1, 1, 64, 36], true);
    problems.project_gated([1, 5, 40, 21], false);
    problems.project_gated([1, 20, 32, 24], true);
    problems.rms_norm([1, 1, 64], false);
    problems.rms_norm([2, 30, 40], true);
    let by_kind = Heads { heads: 4, kv_heads: 2, head_dim: 16, packing: Packing::ByKind };
    let by_group = Heads { heads: 6, kv_heads: 3, head_dim: 32, packing: Packing::ByGroup };
    problems.rotate(by_kind, RotaryPairs::Interleaved, [1, 5, 1], false);
    problems.rotate(by_group, RotaryPairs::HalfSplit, [2, 0, 7], true);
    problems.rotate(by_group, RotaryPairs::Interleaved, [1, 2, 1], true);
    problems.results
}

fn like_burns_own<B: LayerBackend>() {
    for ((name, found), (_, expected)) in results::<B>().iter().zip(results::<Flex>()) {
        let difference = max_difference(found, &expected);
        assert!(difference < 1e-5, "{name}: {difference}, expected below 1e-5");
    }
}

#[test]
#[cfg(feature = "vulkan")]
fn layers_on_vulkan() {
    like_burns_own::<burn::backend::Vulkan>();
}

#[test]
#[cfg(feature = "flex")]
fn layers_on_ndarray() {
    like_burns_own::<burn::backend::NdArray>();
}

/// Gradients of every input of every layer, against those of Burn's own `linear` and of sums worked out by hand.
#[test]
#[cfg(feature = "flex")]
fn layers_have_gradients() {
    use burn::backend::Autodiff;
    type B = Autodiff<Flex>;
    let mut problems: Problems<B> =
        Problems { random: StdRng::seed_from_u64(6), device: Default::default(), results: Vec::new() };
    let [x, weight] = [problems.draw([1, 3, 8]).require_grad(), problems.draw([1, 5, 8]).require_grad()];
    let primitive = |tensor: Tensor<B, 3>| tensor.into_primitive().tensor();
    let matrix = weight.clone().squeeze_dim::<2>(0).into_primitive().tensor();
    let y = Tensor::<B, 3>::from_primitive(TensorPrimitive::Float(B::project(
        primitive(x.clone()),
        matrix,
        None,
        Some(primitive(problems.draw([1, 3, 5]))),
    )));
    let gradients = y.sum().backward();
    let of_x = x.grad(&gradients).unwrap();
    let of_weight = weight.grad(&gradients).unwrap();
    let summed = |tensor: Tensor<B, 3>| tensor.inner().sum_dim(1);
    let close = |a: Tensor<Flex, 3>, b: Tensor<Flex, 3>| {
        assert!((a - b).abs().max().into_scalar() < 1e-5);
    };
    close(of_x, summed(weight).expand([1, 3, 8]));
    close(of_weight, summed(x.clone()).expand([1, 5, 8]));

    let scale = problems.draw([8]).require_grad();
    let y = B::rms_norm(primitive(x.clone()), scale.clone().into_primitive().tensor(), 0.0, false);
    let gradients = Tensor::<B, 3>::from_primitive(TensorPrimitive::Float(y)).sum().backward();
    // A norm does not see the length of its input: its gradient is at a right angle to it.
    let along = (x.grad(&gradients).unwrap() * x.inner()).sum_dim(2);
    assert!(along.abs().max().into_scalar() < 1e-5);
    assert!(scale.grad(&gradients).unwrap().abs().min().into_scalar() > 0.0);
}
