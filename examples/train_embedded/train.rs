//! The loop: forward, loss, backward, step.

use std::collections::BTreeMap;
use std::time::Instant;

use burn::grad_clipping::GradientClippingConfig;
use burn::module::AutodiffModule;
use burn::optim::{AdamWConfig, GradientsParams, Optimizer};
use burn::tensor::activation::log_softmax;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{DType, Int, Tensor, TensorData};
use long_context::backend::LayerBackend;
use long_context::cache::AttentionConfig;
use long_context::models::{Model, ModelConfig};
use sample_attention::Preset;

use crate::batches::{Batch, Batches};
use crate::error::Error;
use crate::locality::{far_share, rows};
use crate::recipe::Recipe;
use crate::sequence::Role;
use crate::tasks::Task;

/// Losses are read from the device, and told, every so many steps.
const LOG_EVERY: usize = 25;

/// Negative log-likelihood of every target, `[sequences, length]`, and the queries and keys of each layer.
pub fn losses<B: LayerBackend>(
    model: &Model<B>,
    batch: &Batch,
    attention: &AttentionConfig,
    attention_dtype: DType,
    device: &B::Device,
) -> (Tensor<B, 2>, Vec<[Tensor<B, 4>; 2]>) {
    let shape = [batch.sequences, batch.length];
    let tensor = |ids: &[i32]| Tensor::<B, 2, Int>::from_data(TensorData::new(ids.to_vec(), shape), device);
    let passed = model.forward_sequences(tensor(&batch.ids), &batch.positions, attention, attention_dtype);
    let targets = tensor(&batch.targets).unsqueeze_dim::<3>(2);
    let losses = log_softmax(model.logits(passed.hidden), 2).gather(2, targets).squeeze_dim::<2>(2).neg();
    (losses, passed.attended)
}

/// Values from the device, row by row.
///
/// # Errors
///
/// A device that fails.
pub fn read<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Result<Vec<f32>, Error> {
    let data = tensor.try_into_data().map_err(|error| Error::Device(error.to_string()))?;
    Ok(data.iter().collect())
}

/// Attention over everything, in every layer.
pub fn dense() -> AttentionConfig {
    AttentionConfig { options: Preset::Dense.options(), ..Default::default() }
}

/// Trains a model from scratch; `log` hears a line now and then.
///
/// # Errors
///
/// A loss that is no number, or a device that fails.
pub fn train<B: AutodiffBackend + LayerBackend>(
    config: &ModelConfig,
    recipe: &Recipe,
    batches: Batches<'_>,
    attention_dtype: DType,
    device: &B::Device,
    log: &mut dyn FnMut(String),
) -> Result<Model<B::InnerBackend>, Error>
where
    B::InnerBackend: LayerBackend,
{
    B::seed(device, recipe.seed);
    let mut model = config.init::<B>(device);
    let settings = &recipe.optimizer;
    let mut optimizer = AdamWConfig::new()
        .with_beta_2(settings.beta_2)
        .with_epsilon(1e-8)
        .with_weight_decay(settings.weight_decay)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(settings.clip_norm)))
        .init();
    let dense = dense();
    let (mut since, mut tokens) = (Instant::now(), 0);
    for (step, batch) in batches.enumerate() {
        let (losses, attended) = losses(&model, &batch, &dense, attention_dtype, device);
        let shape = [batch.sequences, batch.length];
        let weights = Tensor::<B, 2>::from_data(TensorData::new(batch.weights(&recipe.loss), shape), device);
        let told =
            (step % LOG_EVERY == LOG_EVERY - 1 || step + 1 == recipe.steps()).then(|| losses.clone().inner());
        let mut loss = (losses * weights).sum();
        let far = batch.far.map(|weight| (weight, far_share(&attended, &rows(batch.length, step))));
        if let Some((weight, share)) = &far {
            loss = loss + share.clone().mul_scalar(*weight);
        }
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        let rate = recipe.learning_rate(step);
        model = optimizer.step(rate, model, gradients);
        tokens += batch.sequences * batch.length;
        if let Some(losses) = told {
            let (mut lines, all) = by_role(&batch, &read(losses)?);
            if let Some((_, share)) = far {
                lines += &format!("  far {:.3}", read(share.inner())?[0]);
            }
            if !all.is_finite() {
                return Err(Error::Diverged { loss: all, step: step + 1 });
            }
            let speed = tokens as f64 / since.elapsed().as_secs_f64();
            (since, tokens) = (Instant::now(), 0);
            log(format!(
                "step {:>5}  length {:>5}  rate {rate:.1e}  {speed:>8.0} tokens/s  {lines}",
                step + 1,
                batch.length
            ));
        }
    }
    Ok(model.valid())
}

/// The mean loss of each task's tokens of each kind, and of all that count.
fn by_role(batch: &Batch, losses: &[f32]) -> (String, f32) {
    let mut sums: BTreeMap<(Role, Task), (f32, usize)> = BTreeMap::new();
    for (at, (role, loss)) in batch.roles.iter().zip(losses).enumerate() {
        // Text is text, whatever is hidden in it.
        let task = if *role == Role::Asked { batch.tasks[at / batch.length] } else { Task::Text };
        let (sum, count) = sums.entry((*role, task)).or_default();
        *sum += loss;
        *count += 1;
    }
    sums.retain(|(role, _), _| *role != Role::Given);
    let lines: Vec<String> = sums
        .iter()
        .map(|((role, task), (sum, count))| {
            let name = match role {
                Role::Asked => task.name(),
                Role::Copied => "copied",
                Role::Given | Role::Text => "text",
            };
            format!("{name} {:.3}", sum / *count as f32)
        })
        .collect();
    let all = sums.values().fold((0.0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
    (lines.join("  "), all.0 / all.1.max(1) as f32)
}
