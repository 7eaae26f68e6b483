//! A model into a checkpoint folder.

use std::collections::HashMap;
use std::path::Path;

use burn::tensor::{DType, TensorData, backend::Backend};
use burn_store::ModuleSnapshot;
use long_context::models::Model;
use long_context::models::internlm2::{InternLm2Config, RopeScaling};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::error::{Error, Result};

/// Token ids that a `config.json` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenIds {
    /// What every text begins with.
    pub bos: u32,
    /// What ends a text.
    pub eos: Vec<u32>,
}

/// Writes an InternLM2 model into a folder, as [`Checkpoint::open`](crate::Checkpoint::open) reads it:
/// `config.json` and `model.safetensors`, weights rounded to bf16. The folder is made where it is missing; the
/// tokenizer's files are the caller's to add.
///
/// # Errors
///
/// A folder that cannot be written, a device that fails, or a model of other dimensions.
pub fn save_internlm2<B: Backend>(
    folder: impl AsRef<Path>,
    model: &Model<B>,
    config: &InternLm2Config,
    tokens: &TokenIds,
) -> Result<()> {
    let folder = folder.as_ref();
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let file = folder.join("model.safetensors");
    let mut stored: HashMap<String, TensorData> = HashMap::new();
    for snapshot in model.collect(None, None, true) {
        let name = snapshot.full_path();
        let data = snapshot.to_data().map_err(|error| {
            Error::invalid(&file, format_args!("parameter `{name}`"), error, "values from the device")
        })?;
        stored.insert(name, data.convert_dtype(DType::BF16));
    }
    let specs = config.tensors();
    let views = specs
        .iter()
        .map(|spec| {
            let data = stored
                .get(&spec.path)
                .ok_or_else(|| Error::tensor(&file, &spec.name, "no such parameter in the model", "one"))?;
            if data.shape.as_slice() != spec.shape {
                let found = format!("shape {:?} in the model", data.shape.as_slice());
                return Err(Error::tensor(&file, &spec.name, found, format_args!("{:?}", spec.shape)));
            }
            let view = TensorView::new(Dtype::BF16, spec.shape.clone(), data.as_bytes());
            let view = view.map_err(|error| Error::tensor(&file, &spec.name, error, "bf16 values"))?;
            Ok((spec.name.as_str(), view))
        })
        .collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let bytes = safetensors::serialize(views, Some(metadata))
        .map_err(|error| Error::invalid(&file, "content", error, "tensors that can be stored"))?;
    std::fs::write(&file, bytes).map_err(Error::io(&file))?;

    let file = folder.join("config.json");
    let text = format!("{:#}\n", config_json(config, tokens));
    std::fs::write(&file, text).map_err(Error::io(&file))
}

fn config_json(config: &InternLm2Config, tokens: &TokenIds) -> Value {
    let scaling = match config.rope_scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear(factor) => json!({ "type": "linear", "factor": factor }),
        RopeScaling::Dynamic(factor) => json!({ "type": "dynamic", "factor": factor }),
    };
    json!({
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": config.max_position_embeddings,
        "bias": config.bias,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "hidden_act": "silu",
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
    })
}
