//! `config.json` of the supported families.

use std::path::Path;

use long_context::models::ModelConfig;
use long_context::models::chatglm::{ChatGlmConfig, RopeRatio};
use long_context::models::internlm2::{InternLm2Config, RopeScaling};

use crate::error::{Error, Result};
use crate::fields::Fields;

/// Bounds that no real model reaches and whose products cannot overflow.
const MOST_LAYERS: usize = 10_000;
const MOST_HEADS: usize = 100_000;
const MOST_WIDTH: usize = 10_000_000;
const MOST_POSITIONS: usize = 1 << 40;

const SUPPORTED: &str =
    "ChatGLM2, ChatGLM3, GLM-4-9B (model_type chatglm), InternLM2 or InternLM2.5 (internlm2)";

/// Families whose prompts and tokenizers differ; the architectures are two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// ChatGLM2-6B and -32k.
    ChatGlm2,
    /// ChatGLM3-6B, -32k and -128k.
    ChatGlm3,
    /// GLM-4-9B, chat and chat-1m.
    Glm4,
    /// InternLM2 and InternLM2.5.
    InternLm2,
}

impl Family {
    /// The family's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::ChatGlm2 => "ChatGLM2",
            Self::ChatGlm3 => "ChatGLM3",
            Self::Glm4 => "GLM-4-9B",
            Self::InternLm2 => "InternLM2",
        }
    }
}

/// What `rope_ratio` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeRatioKind {
    /// It multiplies the base of the frequencies.
    ScalesBase,
    /// It divides the positions.
    DividesPosition,
}

impl RopeRatioKind {
    pub(crate) fn with(self, ratio: f64) -> RopeRatio {
        match self {
            Self::ScalesBase => RopeRatio::ScalesBase(ratio),
            Self::DividesPosition => RopeRatio::DividesPosition(ratio),
        }
    }
}

/// A parsed `config.json`.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub family: Family,
    pub model: ModelConfig,
    pub eos: Vec<u32>,
}

impl Config {
    pub fn read(folder: &Path) -> Result<Self> {
        let fields = Fields::read(&folder.join("config.json"))?;
        let mut config = match architecture(&fields)? {
            Architecture::ChatGlm => chatglm(&fields)?,
            Architecture::InternLm2 => internlm2(&fields)?,
        };
        let generation = folder.join("generation_config.json");
        if generation.is_file() {
            config.eos.extend(Fields::read(&generation)?.ids("eos_token_id")?);
        }
        config.eos.sort();
        config.eos.dedup();
        Ok(config)
    }
}

enum Architecture {
    ChatGlm,
    InternLm2,
}

fn architecture(fields: &Fields) -> Result<Architecture> {
    let class = fields.get("architectures").and_then(|classes| classes.get(0)?.as_str()).unwrap_or("");
    let model_type = fields.text("model_type").unwrap_or("");
    let refuse = |found: String| Err(Error::invalid(fields.file(), "architecture", found, SUPPORTED));
    for key in ["quantization_config", "quantization_bit"] {
        match fields.get(key) {
            None => {}
            Some(bits) if bits.as_u64() == Some(0) => {}
            Some(_) => {
                return Err(fields.invalid(key, "a quantized checkpoint", "one stored in f32, f16 or bf16"));
            }
        }
    }
    match (model_type, class) {
        ("chatglm", _) | ("", "ChatGLMModel" | "ChatGLMForConditionalGeneration") => {
            // ChatGLM-6B, the first one, has the same model_type and another architecture.
            if fields.get("position_encoding_2d").is_some() || fields.get("inner_hidden_size").is_some() {
                return refuse("ChatGLM-6B (the first generation)".to_string());
            }
            Ok(Architecture::ChatGlm)
        }
        ("internlm2", "InternLM2ForRewardModel") => refuse("InternLM2ForRewardModel".to_string()),
        ("internlm2", _) | ("", "InternLM2ForCausalLM") => Ok(Architecture::InternLm2),
        ("glm4", _) | (_, "Glm4ForCausalLM") => refuse("GLM-4-0414 (glm4: sandwich norms)".to_string()),
        ("", "") => refuse("none named".to_string()),
        ("", class) => refuse(class.to_string()),
        (model_type, class) => refuse(format!("{model_type} ({class})")),
    }
}

fn chatglm(fields: &Fields) -> Result<Config> {
    fields.must_be("rmsnorm", true)?;
    fields.must_be("post_layer_norm", true)?;
    fields.must_be("add_bias_linear", false)?;
    fields.must_be("apply_residual_connection_post_layernorm", false)?;
    fields.must_be("tie_word_embeddings", false)?;
    if let Some(prefix) = fields.get("pre_seq_len").filter(|prefix| prefix.as_u64() != Some(0)) {
        return Err(fields.invalid("pre_seq_len", prefix, "nothing (prefix tuning is not supported)"));
    }

    let num_attention_heads = fields.count("num_attention_heads", MOST_HEADS)?;
    let num_kv_heads = if fields.flag_or("multi_query_attention", false)? {
        divisor(fields, "multi_query_group_num", num_attention_heads)?
    } else {
        num_attention_heads
    };
    let head_dim = fields.count("kv_channels", MOST_WIDTH)?;
    if !head_dim.is_multiple_of(4) {
        return Err(fields.invalid(
            "kv_channels",
            head_dim,
            "a multiple of 4 (half of a head turns in pairs)",
        ));
    }
    let ratio = fields.positive_or("rope_ratio", 1.0)?;
    let eos = fields.ids("eos_token_id")?;
    let seq_length = fields.count("seq_length", MOST_POSITIONS)?;
    let num_layers = fields.count("num_layers", MOST_LAYERS)?;

    // Only GLM-4 has a list of end tokens. ChatGLM2 and 3 are told apart by their name, or by what their
    // published configs differ in: a ratio of 16 against 50 and more, or no ratio and a range of 32768 against
    // 8192.
    let name = fields.text("_name_or_path").unwrap_or("").to_lowercase();
    let old = fields.text("transformers_version") == Some("4.27.1");
    let resembles_2 = match fields.get("rope_ratio") {
        Some(_) => ratio == 16.0 || (old && ratio < 50.0),
        None => seq_length == 32_768,
    };
    let family = if fields.get("eos_token_id").is_some_and(|ids| ids.is_array()) {
        Family::Glm4
    } else if name.contains("chatglm2") || (!name.contains("chatglm3") && resembles_2) {
        Family::ChatGlm2
    } else {
        Family::ChatGlm3
    };
    // ChatGLM2-6B-32k alone divides positions; its config has the keys of ChatGLM3-32k.
    let kind =
        if family == Family::ChatGlm2 { RopeRatioKind::DividesPosition } else { RopeRatioKind::ScalesBase };
    let model = ModelConfig::ChatGlm(ChatGlmConfig {
        hidden_size: fields.count("hidden_size", MOST_WIDTH)?,
        num_layers,
        num_attention_heads,
        num_kv_heads,
        head_dim,
        ffn_hidden_size: fields.count("ffn_hidden_size", MOST_WIDTH)?,
        padded_vocab_size: fields.count("padded_vocab_size", MOST_WIDTH)?,
        layernorm_epsilon: fields.positive_or("layernorm_epsilon", 1e-5)?,
        add_qkv_bias: fields.flag_or("add_qkv_bias", false)?,
        rope_ratio: kind.with(ratio),
        seq_length,
    });
    Ok(Config { family, model, eos })
}

fn internlm2(fields: &Fields) -> Result<Config> {
    fields.must_be("tie_word_embeddings", false)?;
    if let Some(act) = fields.get("hidden_act").filter(|act| act.as_str() != Some("silu")) {
        return Err(fields.invalid("hidden_act", act, "\"silu\""));
    }
    let hidden_size = fields.count("hidden_size", MOST_WIDTH)?;
    let num_attention_heads = divisor(fields, "num_attention_heads", hidden_size)?;
    let num_kv_heads = if fields.get("num_key_value_heads").is_some() {
        divisor(fields, "num_key_value_heads", num_attention_heads)?
    } else {
        num_attention_heads
    };
    let head_dim = hidden_size / num_attention_heads;
    if !head_dim.is_multiple_of(2) || head_dim < 4 {
        let expected = "heads of an even width, at least 4, of hidden_size in all";
        return Err(fields.invalid("num_attention_heads", num_attention_heads, expected));
    }
    let model = ModelConfig::InternLm2(InternLm2Config {
        hidden_size,
        num_layers: fields.count("num_hidden_layers", MOST_LAYERS)?,
        num_attention_heads,
        num_kv_heads,
        intermediate_size: fields.count("intermediate_size", MOST_WIDTH)?,
        vocab_size: fields.count("vocab_size", MOST_WIDTH)?,
        // The class defaults differ from what published configs say.
        rms_norm_eps: fields.positive_or("rms_norm_eps", 1e-6)?,
        rope_theta: fields.positive_or("rope_theta", 10_000.0)?,
        rope_scaling: rope_scaling(fields)?,
        max_position_embeddings: fields.count("max_position_embeddings", MOST_POSITIONS)?,
        bias: fields.flag_or("bias", true)?,
    });
    Ok(Config { family: Family::InternLm2, model, eos: fields.ids("eos_token_id")? })
}

fn rope_scaling(fields: &Fields) -> Result<RopeScaling> {
    let Some(scaling) = fields.object("rope_scaling")? else { return Ok(RopeScaling::None) };
    let kind = scaling.get("type").or_else(|| scaling.get("rope_type"));
    let with: fn(f64) -> RopeScaling = match kind.and_then(|kind| kind.as_str()) {
        Some("linear") => RopeScaling::Linear,
        Some("dynamic") => RopeScaling::Dynamic,
        _ => {
            let found = kind.map_or("nothing".to_string(), |kind| kind.to_string());
            return Err(scaling.invalid("type", found, "\"linear\" or \"dynamic\""));
        }
    };
    match scaling.positive("factor")? {
        factor if factor < 1.0 => Err(scaling.invalid("factor", factor, "a number of at least 1")),
        factor => Ok(with(factor)),
    }
}

/// A count that divides `whole`.
fn divisor(fields: &Fields, key: &str, whole: usize) -> Result<usize> {
    let count = fields.count(key, MOST_WIDTH)?;
    if whole.is_multiple_of(count) {
        Ok(count)
    } else {
        Err(fields.invalid(key, count, &format!("a divisor of {whole}")))
    }
}
