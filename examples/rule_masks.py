#!/usr/bin/env python3
"""Rules as masks over exact attention: what each costs in perplexity, before it is built.

  rule_masks.py CHECKPOINT TEXT [--tokens 8192] [--windows 3] [--only WORD]     (needs: pip install torch tokenizers)

CHECKPOINT is the folder `internlm2` that examples/checkpoint.sh makes. All layers are sparse; everything is float32 and holds
whole score matrices: 30 GB at 8192 tokens. Printed are density, mean mass that is kept, perplexity against dense attention in
percent, and the divergence from dense attention (KL, nats a token).
"""
import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

BLOCK, DEVICE = 128, "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Rule:
    """Bands and columns above a threshold of mass per entry, weighted or not, beside a window."""

    name: str
    bands: bool = True  # bands beside the window, or columns alone
    window: float = 0.04
    threshold: float = 0.0  # in units of 1 / length; 0: the threshold that reaches alpha
    alpha: float = 0.95
    by_layer: bool = False  # alpha in the mean of a layer's heads
    by_entries: bool = True  # columns by mass per entry that they cost, or by mass
    weight: str = ""  # "head" or "layer": distance from the mean value, over the mean of these; "squares", "lengths"
    rows: float = 0.05
    stretch: int = 1 << 30  # rows that share a plan
    tail: int = 128
    exact: int = 0  # distance of the rows whose difference from exact attention corrects those behind
    memory: float = 0.25  # share of the newest difference in the correction


MASS = [Rule(f"mass, {t}", threshold=t) for t in (2, 1.5, 1)]
BY_HEAD = [Rule(f"distances over the head's mean, {t}", threshold=t, weight="head") for t in (1.5, 1.25, 1)]
DISTANCES = dict(threshold=1.25, weight="head")
RULES = [
    Rule("default", bands=False, window=0.08, by_entries=False),
    Rule("joint, 0.95"),
    Rule("joint, 0.97", alpha=0.97),
    *MASS,
    *BY_HEAD,
    Rule("contribution, 1.25", threshold=1.25, weight="layer"),
    Rule("squares of distances, 1.25", threshold=1.25, weight="squares"),
    Rule("lengths, 2", threshold=2, weight="lengths"),
    Rule("distances, every 16th row exact", exact=16, **DISTANCES),
    Rule("mass, 2, every 64th row exact", threshold=2, exact=64, memory=1),
    Rule("distances, stretches of 2048", stretch=2048, **DISTANCES),
    Rule("distances, stretches of 512", stretch=512, **DISTANCES),
    Rule("distances, rows 3%", rows=0.03, **DISTANCES),
    Rule("distances, rows 1.5%", rows=0.015, **DISTANCES),
    Rule("distances, window 2%", window=0.02, **DISTANCES),
    Rule("distances, no window", window=0, **DISTANCES),
    Rule("distances, tail 256", tail=256, **DISTANCES),
    Rule("one threshold a layer, 0.95", by_layer=True),
    Rule("one threshold a layer, 0.97", alpha=0.97, by_layer=True),
]


def value_weights(v, rule):
    """`[kv_heads, length]`, 1 in the mean of a head, or of the layer."""
    if not rule.weight:
        return torch.ones(v.shape[:2], device=DEVICE)
    center = 0 if rule.weight == "lengths" else v.mean(1, keepdim=True)
    weights = (v - center).norm(dim=-1) ** (2 if rule.weight == "squares" else 1)
    return weights / (weights.mean() if rule.weight == "layer" else weights.mean(1, keepdim=True))


def plan(mass, rows, length, tail, rule):
    """Kept bands `[heads, blocks]` and columns `[heads, length]`; `mass` is `[heads, rows, length]`."""
    heads, blocks, columns = len(mass), -(-length // BLOCK), torch.arange(length, device=DEVICE)
    seen = columns <= rows[:, None]
    distance = (rows[:, None] // BLOCK - columns // BLOCK).clamp(min=0)
    window = torch.arange(blocks, device=DEVICE) <= math.ceil(rule.window * length / BLOCK)
    sums = torch.zeros(heads, blocks, device=DEVICE)
    sums.scatter_add_(1, distance.reshape(1, -1).expand(heads, -1), mass.reshape(heads, -1))
    entries = torch.zeros(blocks, device=DEVICE).scatter_add_(0, distance.reshape(-1), seen.float().reshape(-1))
    price = sums / entries.clamp(min=1)
    cost = seen.float().sum(0).clamp(min=1) if rule.by_entries else len(rows)
    total = mass.sum((1, 2))

    def choose(threshold):
        kept = window.expand(heads, -1)
        if rule.bands:
            kept = kept | (price > threshold[:, None])
        outside = (mass * (~kept[:, distance] & seen)).sum(1)
        stripes = (outside / cost > threshold[:, None]) & (columns < tail)
        return kept, stripes, total - (outside * ~stripes).sum(1)

    if rule.threshold:
        return choose(torch.full((heads,), rule.threshold / length, device=DEVICE))[:2]
    low, high = torch.full((heads,), math.log(1e-7), device=DEVICE), torch.zeros(heads, device=DEVICE)
    for _ in range(13):
        middle = (low + high) / 2
        share = choose(middle.exp())[2] / total
        enough = (share.mean() >= rule.alpha).expand_as(low) if rule.by_layer else share >= rule.alpha
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return choose(low.exp())[:2]


def corrected(out, weights, values, tail, rule):
    """Adds to each row what the exact rows before it were missing, in a running mean."""
    rows = torch.arange(rule.exact - 1, tail, rule.exact, device=DEVICE)
    missing = weights[:, rows] @ values - out[:, rows]
    mean, share = torch.zeros_like(missing[:, 0]), 0.0
    for index in range(len(rows)):
        mean = (1 - rule.memory) * mean + rule.memory * missing[:, index]
        share = (1 - rule.memory) * share + rule.memory
        missing[:, index] = mean / share
    positions = torch.arange(out.shape[1], device=DEVICE)
    last = torch.searchsorted(rows, positions, right=True) - 1
    applies = (last >= 0) & (positions < tail)
    return out + missing[:, last.clamp(min=0)] * applies[:, None]


def attend(q, k, v, rule, kept):
    """Attention of all heads; appends density and kept mass. Without a rule, all keys."""
    heads, length, group = len(q), q.shape[1], len(q) // len(k)
    values, positions = v.repeat_interleave(group, 0), torch.arange(length, device=DEVICE)
    seen = positions <= positions[:, None]
    scores = (q @ k.repeat_interleave(group, 0).mT) * q.shape[2] ** -0.5
    weights = scores.masked_fill_(~seen, -math.inf).softmax(-1)
    if rule is None:
        return weights @ values
    tail = max(length - rule.tail, 0) // BLOCK * BLOCK
    by_key = value_weights(v, rule).repeat_interleave(group, 0)[:, None]
    mask = torch.zeros_like(weights, dtype=torch.bool)
    for first in range(0, tail, rule.stretch):
        end = min(first + rule.stretch, tail)
        count = min(max(math.ceil(rule.rows * (end - first)), 16), end - first)
        rows = torch.tensor([first + t * (end - first) // count - 1 for t in range(1, count + 1)], device=DEVICE)
        bands, stripes = plan(weights[:, rows] * by_key, rows, length, tail, rule)
        distance = (positions[first:end, None] // BLOCK - positions // BLOCK).clamp(min=0)
        for head in range(heads):
            mask[head, first:end] = bands[head][distance] | stripes[head]
    mask[:, tail:] = True
    mask &= seen
    density = mask.sum((1, 2)) / seen.sum()
    mask |= (density > 0.9)[:, None, None] & seen
    sparse = weights * mask
    mass = sparse.sum(-1, keepdim=True)
    kept.append(((mask.sum() / seen.sum() / heads).item(), mass[:, :tail].mean().item()))
    out = (sparse @ values) / mass
    return corrected(out, weights, values, tail, rule) if rule.exact else out


class Model:
    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        data = torch.frombuffer(bytearray((folder / "model.safetensors").read_bytes()), dtype=torch.uint8)
        start = 8 + int.from_bytes(bytes(data[:8].tolist()), "little")
        self.tensors = {}
        for name, entry in json.loads(bytes(data[8:start].tolist())).items():
            if name != "__metadata__":
                first, end = (start + offset for offset in entry["data_offsets"])
                values = data[first:end].clone().view(torch.bfloat16).reshape(entry["shape"])
                self.tensors[name] = values.float().to(DEVICE)

    def norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.tensors[name]

    @torch.no_grad()
    def hidden(self, ids, rule, kept):
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        width, length = self.config["hidden_size"] // heads, len(ids)
        rates = self.config["rope_theta"] ** (-torch.arange(0, width, 2, device=DEVICE).double() / width)
        angles = (torch.arange(length, device=DEVICE).double()[:, None] * rates).repeat(1, 2)
        cos, sin = angles.cos().float(), angles.sin().float()
        turn = lambda x: x * cos + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * sin
        x = self.tensors["model.tok_embeddings.weight"][ids]
        for index in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{index}."
            project = lambda x, part: x @ self.tensors[f"{name}{part}.weight"].T
            qkv = project(self.norm(x, name + "attention_norm.weight"), "attention.wqkv")
            qkv = qkv.reshape(length, kv_heads, heads // kv_heads + 2, width)
            q = turn(qkv[:, :, :-2].reshape(length, heads, width).transpose(0, 1))
            k, v = turn(qkv[:, :, -2].transpose(0, 1)), qkv[:, :, -1].transpose(0, 1).contiguous()
            out = attend(q, k, v, rule, kept).transpose(0, 1).reshape(length, -1)
            x = x + project(out, "attention.wo")
            inner = self.norm(x, name + "ffn_norm.weight")
            gates = torch.nn.functional.silu(project(inner, "feed_forward.w1"))
            x = x + project(gates * project(inner, "feed_forward.w3"), "feed_forward.w2")
        return self.norm(x, "model.norm.weight")

    def quality(self, windows, states, dense):
        """Mean loss and divergence from dense attention, nats a token."""
        output, loss, divergence, count = self.tensors["output.weight"].T, 0.0, 0.0, 0
        for ids, state, exact in zip(windows, states, dense):
            for first in range(0, len(ids) - 1, 1024):
                rows = slice(first, min(first + 1024, len(ids) - 1))
                found, expected = ((x[rows] @ output).log_softmax(-1) for x in (state, exact))
                loss -= found.gather(1, ids[rows.start + 1 : rows.stop + 1, None]).double().sum().item()
                divergence += (expected.exp() * (expected - found)).double().sum().item()
                count += rows.stop - rows.start
        return loss / count, divergence / count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--only", default="", help="rules whose names hold this word")
    args = parser.parse_args()
    model = Model(args.checkpoint)
    ids = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json")).encode(args.text.read_text()).ids
    windows = [torch.tensor(ids[i * args.tokens : (i + 1) * args.tokens], device=DEVICE) for i in range(args.windows)]
    dense = [model.hidden(window, None, []) for window in windows]
    base, _ = model.quality(windows, dense, dense)
    print(f"{'dense, perplexity':36} {math.exp(base):.3f}")
    for rule in (rule for rule in RULES if args.only in rule.name):
        kept = []
        states = [model.hidden(window, rule, kept) for window in windows]
        loss, divergence = model.quality(windows, states, dense)
        density, mass = (sum(column) / len(kept) for column in zip(*kept))
        excess = 100 * (math.exp(loss - base) - 1)
        print(f"{rule.name:36} {density:.4f} {mass:.4f} {excess:+.2f}% {divergence:.4f}", flush=True)


if __name__ == "__main__":
    main()
