//! Small tokenizers of every kind against the libraries that they come from.

use long_context_weights::{Family, StreamDecoder, Tokenizer};
use serde_json::{Value, json};

use crate::support::{Chance, Folder, fixture, read_json};

const KINDS: [&str; 3] = ["sentencepiece", "tiktoken", "json"];
const SEED: u64 = 1813;

fn open(folder: &Folder) -> Tokenizer {
    Tokenizer::from_dir(folder.path()).unwrap_or_else(|error| panic!("{error}"))
}

fn of_kind(kind: &str) -> Tokenizer {
    let folder = Folder::empty();
    folder.add_tokenizer(kind);
    open(&folder)
}

fn vectors(kind: &str) -> Value {
    read_json(&fixture("tokenizer").join(kind).join("vectors.json"))
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A text of many scripts, spaces, controls and what looks like special tokens.
fn text(chance: &mut Chance) -> String {
    const WORDS: [&str; 24] = [
        "the ",
        "Elizabeth",
        " danced",
        "你好",
        "世界",
        "魑魅",
        "𠮷",
        "🙂",
        "👩‍🚀",
        "🇨🇳",
        "é",
        "e\u{301}",
        "ไทย",
        "العربية",
        " ",
        "   ",
        "\n",
        "\r\n",
        "\t",
        "\0",
        "\u{1b}",
        "<|user|>",
        "[gMASK]",
        "<0x41>",
    ];
    let mut text = String::new();
    for _ in 0..chance.below(24) {
        match chance.below(4) {
            0 => text.extend(
                char::from_u32(chance.below(0x11_0000) as u32)
                    .filter(|&c| c != '\u{2581}' && c != '\u{fffd}'),
            ),
            1 => text.push(char::from(chance.below(128) as u8)),
            _ => text.push_str(WORDS[chance.below(WORDS.len())]),
        }
    }
    text
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut decoder = StreamDecoder::new(tokenizer);
    let mut parts: Vec<String> = ids.iter().filter_map(|&id| decoder.push(id)).collect();
    assert!(parts.iter().all(|part| !part.is_empty()));
    parts.push(decoder.flush());
    parts
}

#[test]
fn texts_become_the_ids_of_the_library() {
    for kind in KINDS {
        let tokenizer = of_kind(kind);
        let vectors = vectors(kind);
        for case in vectors["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text), ids(&case["ids"]), "{kind}: {text:?}");
        }
    }
}

#[test]
fn ids_become_the_text_of_the_library() {
    for kind in KINDS {
        let tokenizer = of_kind(kind);
        let vectors = vectors(kind);
        let cases =
            vectors["cases"].as_array().unwrap().iter().map(|case| (ids(&case["ids"]), &case["decoded"]));
        let decode =
            vectors["decode"].as_array().unwrap().iter().map(|case| (ids(&case["ids"]), &case["text"]));
        for (ids, text) in cases.chain(decode) {
            assert_eq!(tokenizer.decode(&ids), text.as_str().unwrap(), "{kind}: {ids:?}");
            assert_eq!(streamed(&tokenizer, &ids).concat(), text.as_str().unwrap(), "{kind}: {ids:?}");
        }
    }
}

#[test]
fn any_text_comes_back() {
    for kind in KINDS {
        let tokenizer = of_kind(kind);
        for seed in SEED..SEED + 500 {
            let text = text(&mut Chance::new(seed));
            let ids = tokenizer.encode(&text);
            assert_eq!(tokenizer.decode(&ids), text, "{kind}, seed {seed}");
            let parts = streamed(&tokenizer, &ids);
            assert_eq!(parts.concat(), text, "{kind}, seed {seed}");
            assert!(parts.iter().all(|part| !part.contains('\u{fffd}')), "{kind}, seed {seed}: {parts:?}");
        }
    }
}

#[test]
fn a_stream_of_any_ids_adds_up() {
    for kind in KINDS {
        let tokenizer = of_kind(kind);
        for seed in SEED..SEED + 500 {
            let mut chance = Chance::new(seed);
            // Some of them are special, some stand for nothing.
            let ids: Vec<u32> = (0..chance.below(24)).map(|_| chance.below(1100) as u32).collect();
            let parts = streamed(&tokenizer, &ids);
            assert_eq!(parts.concat(), tokenizer.decode(&ids), "{kind}, seed {seed}: {ids:?}");
        }
    }
}

#[test]
fn a_character_is_shown_once_it_is_whole() {
    for kind in KINDS {
        let tokenizer = of_kind(kind);
        let ids = tokenizer.encode("a𠮷b");
        let mut decoder = StreamDecoder::new(&tokenizer);
        let shown: Vec<_> = ids.iter().map(|&id| decoder.push(id)).collect();
        assert!(shown.contains(&None), "{kind}: {shown:?}");
        assert_eq!(
            (shown.into_iter().flatten().collect::<String>(), decoder.flush()),
            ("a𠮷b".to_string(), String::new())
        );

        let cut = ids.iter().take(ids.len() - 2).copied().collect::<Vec<_>>();
        let mut decoder = StreamDecoder::new(&tokenizer);
        let shown: String = cut.iter().filter_map(|&id| decoder.push(id)).collect();
        assert_eq!((shown.as_str(), decoder.flush().as_str()), ("a", "\u{fffd}"), "{kind}");
        assert_eq!(decoder.flush(), "", "{kind}");
    }
}

/// The small SentencePiece model with pieces that no text has, up to `size` in all.
fn sentencepiece_of(size: usize) -> Vec<u8> {
    let mut model = std::fs::read(fixture("tokenizer/sentencepiece/tokenizer.model")).unwrap();
    for i in 1000..size {
        let text = format!("\u{f0000}{i}");
        let piece = [&[0x0a, text.len() as u8], text.as_bytes(), &[0x15], &(-1e6f32).to_le_bytes()].concat();
        model.extend([&[0x0a, piece.len() as u8], &piece[..]].concat());
    }
    model
}

/// The small ranks with pieces that no text has, up to `size` in all.
fn ranks_of(size: usize) -> Vec<u8> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut ranks = std::fs::read(fixture("tokenizer/tiktoken/tokenizer.model")).unwrap();
    for rank in ranks.iter().filter(|&&byte| byte == b'\n').count()..size {
        let digit = |shift: usize| char::from(DIGITS[(rank >> shift) & 63]);
        // Six bytes, the first of which is in no UTF-8.
        let line = format!("////{}{}{}{} {rank}\n", digit(18), digit(12), digit(6), digit(0));
        ranks.extend(line.as_bytes());
    }
    ranks
}

#[test]
fn special_tokens_have_the_ids_of_their_family() {
    let generations = [
        (
            "chatglm2-32k-tiny",
            sentencepiece_of(64_789),
            &[
                ("<s>", 1),
                ("</s>", 2),
                ("[MASK]", 64_789),
                ("[gMASK]", 64_790),
                ("[sMASK]", 64_791),
                ("sop", 64_792),
                ("eop", 64_793),
            ][..],
        ),
        (
            "chatglm3-32k-tiny",
            sentencepiece_of(64_789),
            &[
                ("<s>", 1),
                ("</s>", 2),
                ("[MASK]", 64_789),
                ("[gMASK]", 64_790),
                ("[sMASK]", 64_791),
                ("sop", 64_792),
                ("eop", 64_793),
                ("<|system|>", 64_794),
                ("<|user|>", 64_795),
                ("<|assistant|>", 64_796),
                ("<|observation|>", 64_797),
            ],
        ),
        (
            "glm4-tiny",
            ranks_of(151_329),
            &[
                ("<|endoftext|>", 151_329),
                ("[MASK]", 151_330),
                ("[gMASK]", 151_331),
                ("[sMASK]", 151_332),
                ("<sop>", 151_333),
                ("<eop>", 151_334),
                ("<|system|>", 151_335),
                ("<|user|>", 151_336),
                ("<|assistant|>", 151_337),
                ("<|observation|>", 151_338),
            ],
        ),
        (
            "internlm2-tiny",
            sentencepiece_of(92_544),
            &[("<s>", 1), ("</s>", 2), ("<|im_end|>", 92_542), ("<|im_start|>", 92_543)],
        ),
    ];
    for (golden, model, specials) in generations {
        let folder = Folder::golden(golden);
        folder.write("tokenizer.model", &model);
        let tokenizer = open(&folder);
        let mut found: Vec<_> = tokenizer.specials().iter().map(|(&id, name)| (name.as_str(), id)).collect();
        found.sort_by_key(|&(_, id)| id);
        assert_eq!(found, specials, "{golden}");
        for &(name, id) in specials {
            assert_eq!((tokenizer.special(name), tokenizer.piece(id).as_str()), (Some(id), name), "{golden}");
            assert_eq!(tokenizer.decode(&[id]), "", "{golden}: {name}");
            assert!(
                tokenizer
                    .encode(&format!("a{name}b {name}"))
                    .iter()
                    .all(|id| found.iter().all(|(_, special)| id != special))
            );
        }
        assert_eq!(tokenizer.special("<|nobody|>"), None);
    }
}

#[test]
fn special_tokens_are_never_made_from_text() {
    let named = json!({ "added_tokens_decoder": {
        "3": { "content": "<|im_end|>", "special": true }, "4": { "content": "<|im_start|>", "special": true },
    }});
    for (golden, kind) in [
        ("chatglm2-32k-tiny", "sentencepiece"),
        ("chatglm3-32k-tiny", "sentencepiece"),
        ("internlm2-tiny", "sentencepiece"),
        ("glm4-tiny", "tiktoken"),
        ("internlm2-tiny", "json"),
    ] {
        let folder = Folder::with_tokenizer(golden, kind);
        if (golden, kind) == ("internlm2-tiny", "sentencepiece") {
            folder.write_json("tokenizer_config.json", &named);
        }
        let tokenizer = open(&folder);
        assert!(tokenizer.specials().len() >= 4, "{golden}: {:?}", tokenizer.specials());
        let mut texts: Vec<String> = tokenizer.specials().values().cloned().collect();
        texts.extend(
            ["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]", "<|user|>", "<|im_start|>", "[gMASK]", "<s>"]
                .map(String::from),
        );
        texts.push(texts.concat());
        for text in texts {
            let ids = tokenizer.encode(&text);
            assert!(
                ids.iter().all(|id| !tokenizer.specials().contains_key(id)),
                "{golden}, {kind}: {text} is {ids:?}"
            );
            assert_eq!(tokenizer.decode(&ids), text, "{golden}, {kind}");
        }
    }
}

#[test]
fn a_config_names_more_special_tokens() {
    let folder = Folder::with_tokenizer("internlm2-tiny", "sentencepiece");
    assert_eq!(folder.open().family(), Family::InternLm2);
    folder.write_json(
        "tokenizer_config.json",
        &json!({ "added_tokens_decoder": {
            "4": { "content": "<|im_start|>", "special": true }, "1003": { "content": "<|plugin|>" },
            "1004": { "content": "ordinary", "special": false },
        }}),
    );
    let tokenizer = open(&folder);
    let special = |name| tokenizer.special(name);
    assert_eq!(
        [special("<|im_start|>"), special("<|plugin|>"), special("ordinary")],
        [Some(4), Some(1003), None]
    );

    for (added, expected) in [
        (
            json!({ "x": { "content": "a" } }),
            "field `added_tokens_decoder.x`: found {\"content\":\"a\"}, expected a number with its `content`",
        ),
        (
            json!({ "1": {} }),
            "field `added_tokens_decoder.1`: found {}, expected a number with its `content`",
        ),
        (json!([]), "field `added_tokens_decoder`: found [], expected an object"),
    ] {
        folder.write_json("tokenizer_config.json", &json!({ "added_tokens_decoder": added }));
        let error = Tokenizer::from_dir(folder.path()).err().unwrap();
        assert_eq!(folder.relative(&error), format!("tokenizer_config.json: {expected}"));
    }
}

#[test]
fn what_is_in_no_vocabulary_is_left_out() {
    let folder = Folder::empty();
    folder.write_json("tokenizer.json", &json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": { "a": 0, "b": 1, "ab": 2 }, "merges": [["a", "b"]] },
    }));
    assert_eq!(open(&folder).encode("ab cab 你 b"), [2, 2, 1]);
}

#[test]
fn files_that_hold_no_tokenizer_are_refused() {
    const MODEL: &str = "expected a SentencePiece model or tiktoken ranks";
    const JSON: &str = "expected a tokenizer.json of the tokenizers library";
    let folder = Folder::empty();
    let refusal = || match Tokenizer::from_dir(folder.path()) {
        Ok(tokenizer) => format!("a tokenizer with {:?}", tokenizer.specials()),
        Err(error) => folder.relative(&error),
    };
    assert_eq!(refusal(), "FOLDER: tokenizer: found none, expected tokenizer.model or tokenizer.json");
    let cut = std::fs::read(fixture("tokenizer/sentencepiece/tokenizer.model")).unwrap()[..5000].to_vec();
    for (name, content, expected) in [
        ("tokenizer.json", b"".to_vec(), JSON),
        ("tokenizer.json", b"{}".to_vec(), JSON),
        ("tokenizer.model", b"".to_vec(), MODEL),
        ("tokenizer.model", b"\n\n".to_vec(), MODEL),
        ("tokenizer.model", b"IQ==".to_vec(), MODEL),
        ("tokenizer.model", b"IQ== x\n".to_vec(), MODEL),
        ("tokenizer.model", b"?? 0\n".to_vec(), MODEL),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n".to_vec(), MODEL),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n".to_vec(), MODEL),
        ("tokenizer.model", vec![0xff; 64], MODEL),
        ("tokenizer.model", cut, MODEL),
    ] {
        folder.write(name, &content);
        let message = refusal();
        assert!(message.starts_with(&format!("{name}: content: found ")), "{message}");
        assert!(message.ends_with(expected), "{message}");
    }
}
