//! Attention with gradients.

use burn::backend::Autodiff;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorPrimitive};
use burn_autodiff::NodeId;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};
use sample_attention_plan::{AttentionShape, SampleAttentionOptions};

use crate::backend::{AttentionBackend, Sparse};
use crate::gradient::{Forward, Kept};

type Tracked<B, C> = FloatTensor<Autodiff<B, C>>;

#[derive(Debug)]
struct Attention;

/// What is kept for the backward pass: q, k and v by their nodes, the rest as it is.
#[derive(Debug, Clone)]
struct State<B: AttentionBackend> {
    inputs: [NodeId; 3],
    output: FloatTensor<B>,
    lse: FloatTensor<B>,
    kept: Option<Kept<B>>,
    scale: f64,
}

impl<B: AttentionBackend> Backward<B, 3> for Attention {
    type State = State<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let State { inputs, output, lse, kept, scale } = ops.state;
        let [q, k, v] = inputs.map(|node| tensor(checkpointer.retrieve_node_output::<FloatTensor<B>>(node)));
        let lse = Tensor::from_primitive(TensorPrimitive::Float(lse));
        let forward = Forward::<B> { q, k, v, output: tensor(output), lse, kept, scale };
        for (parent, gradient) in ops.parents.into_iter().zip(forward.backward(tensor(gradient))) {
            if let Some(node) = parent {
                grads.register::<B>(node.id, gradient.into_primitive().tensor());
            }
        }
    }
}

fn tensor<B: AttentionBackend>(primitive: FloatTensor<B>) -> Tensor<B, 4> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

/// Puts an output into the graph.
fn track<B: AttentionBackend, C: CheckpointStrategy>(
    [q, k, v]: [&Tracked<B, C>; 3],
    output: FloatTensor<B>,
    lse: FloatTensor<B>,
    kept: impl FnOnce() -> Option<Kept<B>>,
    scale: f64,
) -> Tracked<B, C> {
    let nodes = [q.node.clone(), k.node.clone(), v.node.clone()];
    match Attention.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut operation) => {
            let inputs = [q, k, v].map(|input| operation.checkpoint(input));
            let state = State { inputs, output: output.clone(), lse, kept: kept(), scale };
            operation.finish(state, output)
        }
        OpsKind::UnTracked(operation) => operation.finish(output),
    }
}

impl<B: AttentionBackend, C: CheckpointStrategy> AttentionBackend for Autodiff<B, C> {
    fn dense_attention(
        q: Tracked<B, C>,
        k: Tracked<B, C>,
        v: Tracked<B, C>,
        scale: f64,
    ) -> (Tracked<B, C>, Tracked<B, C>) {
        let [inner_q, inner_k, inner_v] = [&q, &k, &v].map(|input| input.primitive.clone());
        let (output, lse) = B::dense_attention(inner_q, inner_k, inner_v, scale);
        (track::<B, C>([&q, &k, &v], output, lse.clone(), || None, scale), Tracked::<B, C>::new(lse))
    }

    /// Only the output has gradients; the plan is held fixed.
    fn sample_attention(
        q: Tracked<B, C>,
        k: Tracked<B, C>,
        v: Tracked<B, C>,
        options: &SampleAttentionOptions,
    ) -> Sparse<Self> {
        let [inner_q, inner_k, inner_v] = [&q, &k, &v].map(|input| input.primitive.clone());
        let dims = tensor::<B>(inner_q.clone()).dims();
        let [_, kv_heads, kv_len, _] = tensor::<B>(inner_k.clone()).dims();
        let [batch, q_heads, q_len, head_dim] = dims;
        let shape = AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim };
        let sparse = B::sample_attention(inner_q, inner_k, inner_v, options);
        let kept = || {
            let (table, stripes) = (sparse.table.clone(), sparse.stripes.clone());
            let (table, stripes) = (Tensor::from_primitive(table), Tensor::from_primitive(stripes));
            Some(Kept::new(table, stripes, kv_len, shape.tail_start(options), options.block_size))
        };
        let (output, lse) = (sparse.output.clone(), sparse.lse.clone());
        Sparse {
            output: track::<B, C>([&q, &k, &v], output, lse, kept, shape.scale(options)),
            lse: Tracked::<B, C>::new(sparse.lse),
            density: Tracked::<B, C>::new(sparse.density),
            recall: Tracked::<B, C>::new(sparse.recall),
            table: sparse.table,
            stripes: sparse.stripes,
        }
    }
}
