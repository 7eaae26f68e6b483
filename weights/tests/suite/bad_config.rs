//! A `config.json` that cannot be: one line that names the field, what it holds and what would fit.

use serde_json::{Value, json};

use crate::support::{CONFIG, Folder, MODEL};

const WIDTH: u64 = 10_000_000;
const POSITIONS: u64 = 1 << 40;
const LAYERS: u64 = 10_000;

/// Sets one field and says what is then said about the folder.
fn refusal(golden: &str, key: &str, value: Value) -> String {
    let folder = Folder::golden(golden);
    folder.configure(key, value);
    folder.refusal()
}

fn check(golden: &str, cases: &[(&str, Value, &str)]) {
    for (key, value, message) in cases {
        assert_eq!(refusal(golden, key, value.clone()), *message, "{golden}: {key} = {value}");
    }
}

#[test]
fn counts_are_whole_numbers_within_reason() {
    let fields = [
        ("internlm2-tiny", "hidden_size", WIDTH),
        ("internlm2-tiny", "num_hidden_layers", LAYERS),
        ("internlm2-tiny", "num_attention_heads", WIDTH),
        ("internlm2-tiny", "num_key_value_heads", WIDTH),
        ("internlm2-tiny", "intermediate_size", WIDTH),
        ("internlm2-tiny", "vocab_size", WIDTH),
        ("internlm2-tiny", "max_position_embeddings", POSITIONS),
        ("glm4-tiny", "hidden_size", WIDTH),
        ("glm4-tiny", "num_layers", LAYERS),
        ("glm4-tiny", "num_attention_heads", 100_000),
        ("glm4-tiny", "multi_query_group_num", WIDTH),
        ("glm4-tiny", "kv_channels", WIDTH),
        ("glm4-tiny", "ffn_hidden_size", WIDTH),
        ("glm4-tiny", "padded_vocab_size", WIDTH),
        ("glm4-tiny", "seq_length", POSITIONS),
    ];
    let too_many = json!(u64::MAX);
    let values =
        [json!(0), json!(-1), json!(1.5), json!("64"), json!(true), json!([64]), json!(1e30), too_many];
    for (golden, key, most) in fields {
        let folder = Folder::golden(golden);
        for value in &values {
            folder.configure(key, value.clone());
            let expected = format!(
                "config.json: field `{key}`: found {value}, expected a whole number from 1 to {most}"
            );
            assert_eq!(folder.refusal(), expected);
        }
        if key != "num_key_value_heads" {
            folder.configure(key, Value::Null);
            let expected = format!(
                "config.json: field `{key}`: found nothing, expected a whole number from 1 to {most}"
            );
            assert_eq!(folder.refusal(), expected);
        }
    }
}

#[test]
fn heads_divide_what_they_share() {
    check(
        "internlm2-tiny",
        &[
            (
                "num_attention_heads",
                json!(7),
                "config.json: field `num_attention_heads`: found 7, expected a divisor of 64",
            ),
            (
                "num_attention_heads",
                json!(65),
                "config.json: field `num_attention_heads`: found 65, expected a divisor of 64",
            ),
            (
                "num_key_value_heads",
                json!(3),
                "config.json: field `num_key_value_heads`: found 3, expected a divisor of 8",
            ),
            (
                "num_key_value_heads",
                json!(16),
                "config.json: field `num_key_value_heads`: found 16, expected a divisor of 8",
            ),
            (
                "num_attention_heads",
                json!(64),
                "config.json: field `num_attention_heads`: found 64, expected heads of an even width, at least 4, of hidden_size in all",
            ),
            (
                "hidden_size",
                json!(56),
                "config.json: field `num_attention_heads`: found 8, expected heads of an even width, at least 4, of hidden_size in all",
            ),
        ],
    );
    check(
        "glm4-tiny",
        &[
            (
                "multi_query_group_num",
                json!(3),
                "config.json: field `multi_query_group_num`: found 3, expected a divisor of 8",
            ),
            (
                "kv_channels",
                json!(15),
                "config.json: field `kv_channels`: found 15, expected a multiple of 4 (half of a head turns in pairs)",
            ),
            (
                "kv_channels",
                json!(18),
                "config.json: field `kv_channels`: found 18, expected a multiple of 4 (half of a head turns in pairs)",
            ),
        ],
    );
}

#[test]
fn scales_are_finite_and_above_zero() {
    let fields = [
        ("internlm2-tiny", "rms_norm_eps"),
        ("internlm2-tiny", "rope_theta"),
        ("glm4-tiny", "layernorm_epsilon"),
        ("glm4-tiny", "rope_ratio"),
    ];
    for (golden, key) in fields {
        let folder = Folder::golden(golden);
        for value in [json!(0), json!(0.0), json!(-1e-5), json!("1e-5"), json!(false), json!("NaN")] {
            folder.configure(key, value.clone());
            let expected =
                format!("config.json: field `{key}`: found {value}, expected a finite number above 0");
            assert_eq!(folder.refusal(), expected);
        }
    }
}

#[test]
fn rotary_scaling_is_a_known_one() {
    let factor = |factor: Value| json!({ "type": "dynamic", "factor": factor });
    check(
        "internlm2-ntk-tiny",
        &[
            (
                "rope_scaling",
                json!("dynamic"),
                "config.json: field `rope_scaling`: found \"dynamic\", expected an object",
            ),
            (
                "rope_scaling",
                json!({}),
                "config.json: field `rope_scaling.type`: found nothing, expected \"linear\" or \"dynamic\"",
            ),
            (
                "rope_scaling",
                json!({ "type": "yarn", "factor": 2.0 }),
                "config.json: field `rope_scaling.type`: found \"yarn\", expected \"linear\" or \"dynamic\"",
            ),
            (
                "rope_scaling",
                json!({ "rope_type": "llama3" }),
                "config.json: field `rope_scaling.type`: found \"llama3\", expected \"linear\" or \"dynamic\"",
            ),
            (
                "rope_scaling",
                json!({ "type": 2 }),
                "config.json: field `rope_scaling.type`: found 2, expected \"linear\" or \"dynamic\"",
            ),
            (
                "rope_scaling",
                json!({ "type": "linear" }),
                "config.json: field `rope_scaling.factor`: found nothing, expected a finite number above 0",
            ),
            (
                "rope_scaling",
                factor(json!(0)),
                "config.json: field `rope_scaling.factor`: found 0, expected a finite number above 0",
            ),
            (
                "rope_scaling",
                factor(json!(-2.0)),
                "config.json: field `rope_scaling.factor`: found -2.0, expected a finite number above 0",
            ),
            (
                "rope_scaling",
                factor(json!("2")),
                "config.json: field `rope_scaling.factor`: found \"2\", expected a finite number above 0",
            ),
            (
                "rope_scaling",
                factor(json!(0.5)),
                "config.json: field `rope_scaling.factor`: found 0.5, expected a number of at least 1",
            ),
            (
                "rope_scaling",
                json!({ "type": "linear", "factor": 0.5 }),
                "config.json: field `rope_scaling.factor`: found 0.5, expected a number of at least 1",
            ),
        ],
    );
}

#[test]
fn variants_without_an_implementation_are_refused() {
    const NOT_TRUE: &str = "expected true (the other is not supported)";
    const NOT_FALSE: &str = "expected false (the other is not supported)";
    let line = |key: &str, found: &str, expected: &str| {
        format!("config.json: field `{key}`: found {found}, {expected}")
    };
    for (golden, key, value, expected) in [
        ("glm4-tiny", "rmsnorm", json!(false), NOT_TRUE),
        ("glm4-tiny", "post_layer_norm", json!(false), NOT_TRUE),
        ("glm4-tiny", "add_bias_linear", json!(true), NOT_FALSE),
        ("glm4-tiny", "apply_residual_connection_post_layernorm", json!(true), NOT_FALSE),
        ("glm4-tiny", "tie_word_embeddings", json!(true), NOT_FALSE),
        ("glm4-tiny", "pre_seq_len", json!(128), "expected nothing (prefix tuning is not supported)"),
        ("glm4-tiny", "add_qkv_bias", json!("yes"), "expected true or false"),
        ("glm4-tiny", "multi_query_attention", json!(1), "expected true or false"),
        ("internlm2-tiny", "tie_word_embeddings", json!(true), NOT_FALSE),
        ("internlm2-tiny", "bias", json!("false"), "expected true or false"),
        ("internlm2-tiny", "hidden_act", json!("gelu"), "expected \"silu\""),
    ] {
        let found = value.to_string();
        assert_eq!(refusal(golden, key, value), line(key, &found, expected));
    }
    for key in ["quantization_config", "quantization_bit"] {
        for (golden, value) in [("glm4-tiny", json!(4)), ("internlm2-tiny", json!({ "bits": 4 }))] {
            let expected = "expected one stored in f32, f16 or bf16";
            assert_eq!(refusal(golden, key, value), line(key, "a quantized checkpoint", expected));
        }
    }
    let folder = Folder::golden("chatglm2-tiny");
    folder.configure("quantization_bit", json!(0));
    folder.open();
}

#[test]
fn end_tokens_are_ids() {
    for value in [json!(-1), json!("2"), json!([2, "x"]), json!(1.5), json!(u64::MAX), json!({ "id": 2 })] {
        let expected = |file| {
            format!("{file}: field `eos_token_id`: found {value}, expected a token id or a list of them")
        };
        assert_eq!(refusal("internlm2-tiny", "eos_token_id", value.clone()), expected(CONFIG));
        let folder = Folder::golden("internlm2-tiny");
        folder.write_json("generation_config.json", &json!({ "eos_token_id": value }));
        assert_eq!(folder.refusal(), expected("generation_config.json"));
    }
}

#[test]
fn other_architectures_are_refused_by_name() {
    const SUPPORTED: &str =
        "ChatGLM2, ChatGLM3, GLM-4-9B (model_type chatglm), InternLM2 or InternLM2.5 (internlm2)";
    let classes = |class: &str| json!([class]);
    for (config, name) in [
        (
            json!({ "model_type": "glm4", "architectures": classes("Glm4ForCausalLM") }),
            "GLM-4-0414 (glm4: sandwich norms)",
        ),
        (json!({ "model_type": "glm4" }), "GLM-4-0414 (glm4: sandwich norms)"),
        (json!({ "architectures": classes("Glm4ForCausalLM") }), "GLM-4-0414 (glm4: sandwich norms)"),
        (
            json!({ "model_type": "chatglm", "position_encoding_2d": true }),
            "ChatGLM-6B (the first generation)",
        ),
        (
            json!({ "model_type": "chatglm", "architectures": classes("ChatGLMModel"), "inner_hidden_size": 16384 }),
            "ChatGLM-6B (the first generation)",
        ),
        (
            json!({ "model_type": "llama", "architectures": classes("LlamaForCausalLM") }),
            "llama (LlamaForCausalLM)",
        ),
        (json!({ "model_type": "glm", "architectures": classes("GlmForCausalLM") }), "glm (GlmForCausalLM)"),
        (
            json!({ "model_type": "internlm", "architectures": classes("InternLMForCausalLM") }),
            "internlm (InternLMForCausalLM)",
        ),
        (
            json!({ "model_type": "internlm2", "architectures": classes("InternLM2ForRewardModel") }),
            "InternLM2ForRewardModel",
        ),
        (json!({ "architectures": classes("BertModel") }), "BertModel"),
        (json!({ "model_type": 5, "architectures": "ChatGLMModel" }), "none named"),
        (json!({}), "none named"),
    ] {
        let folder = Folder::golden("internlm2-tiny");
        folder.write_json(CONFIG, &config);
        let expected = format!("config.json: architecture: found {name}, expected {SUPPORTED}");
        assert_eq!(folder.refusal(), expected, "{config}");
    }
}

#[test]
fn the_config_is_a_json_object() {
    let folder = Folder::golden("internlm2-tiny");
    for (text, found) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("{", "EOF while parsing an object at line 1 column 1"),
        ("[]", "invalid type: sequence, expected a map at line 1 column 0"),
        ("null", "invalid type: null, expected a map at line 1 column 4"),
        ("{\"hidden_size\": NaN}", "expected value at line 1 column 17"),
        ("{\"hidden_size\": 1e999}", "number out of range at line 1 column 21"),
        ("{}\n{}", "trailing characters at line 2 column 1"),
    ] {
        folder.write(CONFIG, text.as_bytes());
        assert_eq!(folder.refusal(), format!("config.json: content: found {found}, expected a JSON object"));
    }
    folder.write(CONFIG, b"{\"model_type\": \"\xff\"}");
    assert_eq!(folder.refusal(), "config.json: stream did not contain valid UTF-8");
    folder.remove(CONFIG);
    assert_eq!(folder.refusal(), "config.json: No such file or directory (os error 2)");
    folder.remove(MODEL);
    assert_eq!(folder.refusal(), "config.json: No such file or directory (os error 2)");
}

#[test]
fn a_message_is_one_line_whatever_the_file_holds() {
    let found = refusal("internlm2-tiny", "hidden_act", json!("a\nb\u{1b}[2J\u{85}c"));
    assert!(!found.contains(char::is_control), "{found:?}");
    let long = refusal("internlm2-tiny", "hidden_size", json!("x".repeat(100_000)));
    assert!(long.len() < 400, "{} bytes", long.len());
    let folder = Folder::golden("internlm2-tiny-sharded");
    folder.edit_json(crate::support::INDEX, |index| {
        let map = index["weight_map"].as_object_mut().unwrap();
        map.insert("output.weight".to_string(), json!("two\nlines\u{1b}[2J\0"));
    });
    let expected = "model.safetensors.index.json: shard `two lines [2J `: found no such file, expected one in the folder";
    folder.remove("model-00001-of-00002.safetensors");
    folder.remove("model-00002-of-00002.safetensors");
    folder.edit_json(crate::support::INDEX, |index| {
        index["weight_map"].as_object_mut().unwrap().retain(|name, _| name == "output.weight");
    });
    assert_eq!(folder.refusal(), expected);
}
