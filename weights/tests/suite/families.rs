//! The published configs of every supported model, opened with weights of their true sizes.

use std::fs::File;
use std::io::Write;

use long_context::models::ModelConfig;
use long_context::models::chatglm::{ChatGlmConfig, RopeRatio};
use long_context::models::internlm2::{InternLm2Config, RopeScaling};
use long_context_weights::{Checkpoint, Family, RopeRatioKind};
use serde_json::{Map, Value, json};

use crate::support::{CONFIG, Folder, MODEL};

/// Weights of a model as f16: a true header over a hole, which takes no room on the disk.
fn write_weights(folder: &Folder, model: &ModelConfig) {
    let (mut header, mut end) = (Map::new(), 0);
    for spec in model.tensors() {
        let start = end;
        end += 2 * spec.elements();
        let entry = json!({ "dtype": "F16", "shape": spec.shape, "data_offsets": [start, end] });
        header.insert(spec.name, entry);
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(folder.path().join(MODEL)).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
}

/// Opens a config over weights that fit `expected`, and compares what was read with it.
fn open(config: &Value, family: Family, expected: &ModelConfig) -> Checkpoint {
    let folder = Folder::empty();
    folder.write_json(CONFIG, config);
    write_weights(&folder, expected);
    let checkpoint = folder.open();
    assert_eq!(checkpoint.family(), family, "{config}");
    assert_eq!(checkpoint.config(), expected, "{config}");
    checkpoint
}

/// `config.json` of ChatGLM2-6B; later models differ in a few fields.
fn chatglm(changes: Value) -> Value {
    let mut config = json!({
        "model_type": "chatglm", "architectures": ["ChatGLMModel"],
        "add_bias_linear": false, "add_qkv_bias": true, "apply_query_key_layer_scaling": true,
        "apply_residual_connection_post_layernorm": false, "attention_dropout": 0.0,
        "attention_softmax_in_fp32": true, "bias_dropout_fusion": true, "ffn_hidden_size": 13696,
        "fp32_residual_connection": false, "hidden_dropout": 0.0, "hidden_size": 4096, "kv_channels": 128,
        "layernorm_epsilon": 1e-05, "multi_query_attention": true, "multi_query_group_num": 2,
        "num_attention_heads": 32, "num_layers": 28, "original_rope": true, "padded_vocab_size": 65024,
        "post_layer_norm": true, "rmsnorm": true, "seq_length": 32768, "use_cache": true,
        "torch_dtype": "float16", "transformers_version": "4.27.1", "tie_word_embeddings": false,
        "eos_token_id": 2, "pad_token_id": 0,
    });
    change(&mut config, changes);
    config
}

fn glm4(changes: Value) -> Value {
    let mut config = chatglm(json!({
        "layernorm_epsilon": 1.5625e-07, "num_layers": 40, "num_hidden_layers": 40, "padded_vocab_size": 151552,
        "vocab_size": 151552, "rope_ratio": 500, "seq_length": 131072, "torch_dtype": "bfloat16",
        "transformers_version": "4.30.2", "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329,
    }));
    change(&mut config, changes);
    config
}

fn internlm2(changes: Value) -> Value {
    let mut config = json!({
        "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "attn_implementation": "eager",
        "bias": false, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pad_token_id": 2,
        "rms_norm_eps": 1e-05, "rope_scaling": { "type": "dynamic", "factor": 2.0 }, "rope_theta": 1000000,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.37.1",
        "use_cache": true, "vocab_size": 92544,
    });
    change(&mut config, changes);
    config
}

fn change(config: &mut Value, changes: Value) {
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
            value => config[key] = value.clone(),
        }
    }
}

fn chatglm_6b(rope_ratio: RopeRatio, seq_length: usize) -> ChatGlmConfig {
    ChatGlmConfig {
        hidden_size: 4096,
        num_layers: 28,
        num_attention_heads: 32,
        num_kv_heads: 2,
        head_dim: 128,
        ffn_hidden_size: 13696,
        padded_vocab_size: 65024,
        layernorm_epsilon: 1e-5,
        add_qkv_bias: true,
        rope_ratio,
        seq_length,
    }
}

#[test]
fn chatglm_configs_tell_generation_and_ratio() {
    use Family::{ChatGlm2, ChatGlm3};
    use RopeRatio::{DividesPosition, ScalesBase};
    for (changes, family, ratio, length) in [
        (json!({}), ChatGlm2, DividesPosition(1.0), 32_768),
        (json!({ "_name_or_path": "THUDM/chatglm2-6b" }), ChatGlm2, DividesPosition(1.0), 32_768),
        (
            json!({ "_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 16 }),
            ChatGlm2,
            DividesPosition(16.0),
            32_768,
        ),
        (json!({ "rope_ratio": 16 }), ChatGlm2, DividesPosition(16.0), 32_768),
        (
            json!({ "rope_ratio": 16, "transformers_version": "4.40.2" }),
            ChatGlm2,
            DividesPosition(16.0),
            32_768,
        ),
        (
            json!({ "_name_or_path": "THUDM/chatglm3-6b", "seq_length": 8192 }),
            ChatGlm3,
            ScalesBase(1.0),
            8192,
        ),
        (json!({ "seq_length": 8192 }), ChatGlm3, ScalesBase(1.0), 8192),
        (
            json!({ "_name_or_path": "THUDM/chatglm3-6b-32k", "rope_ratio": 50 }),
            ChatGlm3,
            ScalesBase(50.0),
            32_768,
        ),
        (json!({ "rope_ratio": 50 }), ChatGlm3, ScalesBase(50.0), 32_768),
        (
            json!({ "_name_or_path": "THUDM/chatglm3-6b-128k", "rope_ratio": 500, "seq_length": 131072 }),
            ChatGlm3,
            ScalesBase(500.0),
            131_072,
        ),
        (json!({ "rope_ratio": 500, "seq_length": 131072 }), ChatGlm3, ScalesBase(500.0), 131_072),
        (
            json!({ "_name_or_path": "/data/ChatGLM3-6B-32K", "rope_ratio": 16 }),
            ChatGlm3,
            ScalesBase(16.0),
            32_768,
        ),
    ] {
        let expected = ModelConfig::ChatGlm(chatglm_6b(ratio, length));
        let checkpoint = open(&chatglm(changes.clone()), family, &expected);
        assert_eq!(checkpoint.eos(), [2], "{changes}");
        assert_eq!(checkpoint.config().context_length(), length, "{changes}");
        assert_eq!(checkpoint.bytes(), 12_487_168_000, "{changes}");
        assert_eq!(checkpoint.stored_types(), ["f16"]);
    }
}

#[test]
fn glm_4_configs() {
    let model = |ratio, groups, length| {
        ModelConfig::ChatGlm(ChatGlmConfig {
            num_layers: 40,
            num_kv_heads: groups,
            padded_vocab_size: 151_552,
            layernorm_epsilon: 1.5625e-7,
            ..chatglm_6b(RopeRatio::ScalesBase(ratio), length)
        })
    };
    let chat_1m = json!({ "multi_query_group_num": 4, "rope_ratio": 10000, "seq_length": 1048576 });
    let base = json!({ "architectures": ["ChatGLMForConditionalGeneration"], "rope_ratio": null, "seq_length": 8192 });
    for (changes, model, bytes) in [
        (json!({}), model(500.0, 2, 131_072), 18_799_902_720u64),
        (chat_1m, model(10_000.0, 4, 1_048_576), 18_967_715_840),
        (base, model(1.0, 2, 8192), 18_799_902_720),
    ] {
        let checkpoint = open(&glm4(changes), Family::Glm4, &model);
        assert_eq!(checkpoint.eos(), [151329, 151336, 151338]);
        assert_eq!(checkpoint.bytes(), bytes);
    }
}

#[test]
fn internlm2_configs_of_every_size() {
    use RopeScaling::{Dynamic, Linear, None};
    let seven = |rope_scaling, max_position_embeddings, rope_theta| InternLm2Config {
        hidden_size: 4096,
        num_layers: 32,
        num_attention_heads: 32,
        num_kv_heads: 8,
        intermediate_size: 14_336,
        vocab_size: 92_544,
        rms_norm_eps: 1e-5,
        rope_theta,
        rope_scaling,
        max_position_embeddings,
        bias: false,
    };
    let dynamic = |factor: f64| json!({ "type": "dynamic", "factor": factor });
    let small = json!({
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_hidden_layers": 24,
    });
    let large = json!({
        "hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48, "num_hidden_layers": 48,
    });
    let small_model = InternLm2Config {
        hidden_size: 2048,
        num_layers: 24,
        num_attention_heads: 16,
        intermediate_size: 8192,
        ..seven(Dynamic(2.0), 32_768, 1e6)
    };
    let large_model = InternLm2Config {
        hidden_size: 6144,
        num_layers: 48,
        num_attention_heads: 48,
        intermediate_size: 16_384,
        ..seven(Dynamic(2.0), 32_768, 1e6)
    };
    for (changes, model, context) in [
        (small, small_model, 65_536),
        (json!({}), seven(Dynamic(2.0), 32_768, 1e6), 65_536),
        (large, large_model, 65_536),
        (json!({ "rope_scaling": null }), seven(None, 32_768, 1e6), 32_768),
        (
            json!({ "rope_scaling": { "type": "linear", "factor": 4 }, "max_position_embeddings": 8192 }),
            seven(Linear(4.0), 8192, 1e6),
            32_768,
        ),
        // InternLM2.5-7B-Chat-1M.
        (
            json!({ "max_position_embeddings": 262144, "rope_scaling": dynamic(2.5), "rope_theta": 50000000 }),
            seven(Dynamic(2.5), 262_144, 5e7),
            655_360,
        ),
    ] {
        let model = ModelConfig::InternLm2(model);
        let checkpoint = open(&internlm2(changes), Family::InternLm2, &model);
        assert_eq!(checkpoint.eos(), [2]);
        assert_eq!(checkpoint.config().context_length(), context);
    }
}

#[test]
fn absent_fields_take_the_defaults_of_the_model_class() {
    let bare = json!({
        "model_type": "internlm2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 96, "vocab_size": 128, "max_position_embeddings": 256,
    });
    let model = ModelConfig::InternLm2(InternLm2Config {
        hidden_size: 64,
        num_layers: 2,
        num_attention_heads: 4,
        num_kv_heads: 4,
        intermediate_size: 96,
        vocab_size: 128,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        max_position_embeddings: 256,
        bias: true,
    });
    assert!(open(&bare, Family::InternLm2, &model).eos().is_empty());

    let bare = json!({
        "model_type": "chatglm", "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 16,
        "ffn_hidden_size": 96, "padded_vocab_size": 128, "seq_length": 256, "multi_query_group_num": 2,
    });
    let model = ModelConfig::ChatGlm(ChatGlmConfig {
        hidden_size: 64,
        num_layers: 2,
        num_attention_heads: 4,
        num_kv_heads: 4,
        head_dim: 16,
        ffn_hidden_size: 96,
        padded_vocab_size: 128,
        layernorm_epsilon: 1e-5,
        add_qkv_bias: false,
        rope_ratio: RopeRatio::ScalesBase(1.0),
        seq_length: 256,
    });
    open(&bare, Family::ChatGlm3, &model);
}

#[test]
fn the_meaning_of_rope_ratio_can_be_overridden() {
    let ratio = |checkpoint: &Checkpoint| match checkpoint.config() {
        ModelConfig::ChatGlm(config) => config.rope_ratio,
        ModelConfig::InternLm2(_) => unreachable!(),
    };
    let mut checkpoint = Folder::golden("chatglm3-32k-tiny").open();
    assert_eq!(ratio(&checkpoint), RopeRatio::ScalesBase(50.0));
    checkpoint.set_rope_ratio(RopeRatioKind::DividesPosition).unwrap();
    assert_eq!(ratio(&checkpoint), RopeRatio::DividesPosition(50.0));
    checkpoint.set_rope_ratio(RopeRatioKind::ScalesBase).unwrap();
    assert_eq!(ratio(&checkpoint), RopeRatio::ScalesBase(50.0));
    assert_eq!(checkpoint.family(), Family::ChatGlm3);

    let folder = Folder::golden("internlm2-tiny");
    let error = folder.open().set_rope_ratio(RopeRatioKind::ScalesBase).unwrap_err();
    let expected =
        "config.json: rope_ratio: found InternLM2, which has none, expected a ChatGLM or GLM-4 model";
    assert_eq!(folder.relative(&error), expected);
}

#[test]
fn end_tokens_come_from_both_configs() {
    for (config, generation, expected) in [
        (json!(2), json!([2, 92542]), vec![2, 92542]),
        (json!([7, 5]), json!(6), vec![5, 6, 7]),
        (Value::Null, json!(2), vec![2]),
        (Value::Null, Value::Null, vec![]),
    ] {
        let folder = Folder::golden("internlm2-tiny");
        folder.configure("eos_token_id", config);
        folder.write_json("generation_config.json", &json!({ "eos_token_id": generation }));
        assert_eq!(folder.open().eos(), expected);
    }
}
