#!/usr/bin/env python3
"""Ways to score columns beside the window, on captured q, k and v, with exact attention.

  sattn capture CHECKPOINT --layer N --file TEXT --tokens 4096 --out layerN.safetensors
  column_scores.py layerN.safetensors...     (needs: pip install numpy)

Columns are taken in the order of a score until they cost what those of preset `default` cost. Printed are means over
heads: the mass that rows between the window and the dense tail keep, that of all but a twentieth of them, the relative
error of an output row, and the density.
"""
import json
import sys

import numpy as np

WINDOW, TAIL, ALPHA, ROWS = 0.08, 128, 0.95, 0.05


def read(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {name: np.frombuffer(data[entry["data_offsets"][0]:entry["data_offsets"][1]], "<f4").reshape(entry["shape"])[0]
            for name, entry in tensors.items()}


def attention(q, k):
    scores = (q @ k.T) * q.shape[1] ** -0.5
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def until(score, amount, goal):
    """The columns of the highest scores until their amounts reach a goal."""
    order = np.argsort(-score, kind="stable")
    return order[: np.searchsorted(np.cumsum(amount[order]), goal) + 1] if goal > 0 else order[:0]


def orders(mass, rows, window_mass, entries):
    """Scores by name; `mass` is `[sampled rows, columns]` outside the window."""
    total, late = mass.sum(0), (mass * rows[:, None]).sum(0)
    columns = until(total, total, ALPHA * len(rows) - window_mass.sum())
    half = columns[: max(1, len(columns) // 2)] if len(columns) else columns
    lacking = np.maximum(ALPHA - window_mass - mass[:, half].sum(1), 0)
    second = (mass * lacking[:, None]).sum(0)
    second[half] = np.inf
    return columns, {
        "sampled mass": total,
        "mass over entries": total / entries,
        "squares": (mass**2).sum(0),
        "squares over entries": (mass**2).sum(0) / entries,
        "late rows more": late,
        "late rows more, over entries": late / entries,
        "lacking rows, second half": second,
        "largest of a row": mass.max(0),
        "bounded p / (p + 0.02)": (mass / (mass + 0.02)).sum(0),
    }


def measure(weights, values, columns, band, window):
    length = len(weights)
    keep = band.copy()
    keep[:, columns] = True
    keep[length - TAIL:] = True
    keep &= np.tri(length, dtype=bool)
    kept = (weights * keep).sum(1)
    exact, sparse = weights @ values, (weights * keep) @ values / kept[:, None]
    error = np.linalg.norm(sparse - exact, axis=1) / np.linalg.norm(exact, axis=1)
    body = slice(window, length - TAIL)
    return kept[body].mean(), np.quantile(kept[body], 0.05), error[body].mean(), keep.sum() / (length * (length + 1) / 2)


def main(paths):
    random, results = np.random.default_rng(0), {}
    for path in paths:
        tensors, heads = read(path), []
        group = len(tensors["q"]) // len(tensors["k"])
        for head, q in enumerate(tensors["q"]):
            length = len(q)
            window, positions = int(WINDOW * length), np.arange(length)
            band = positions[:, None] - positions[None, :] < window
            cost = np.maximum(length - positions - window, 0)
            entries = np.maximum(cost, 1)
            weights, values = attention(q, tensors["k"][head // group]), tensors["v"][head // group]
            sampled = random.choice(length - 1, int(ROWS * length), replace=False)
            rows = np.sort(np.append(sampled, length - 1))
            mass = np.where(band[rows], 0, weights[rows])
            columns, scores = orders(mass, rows, 1 - mass.sum(1), entries)
            plans = {name: until(score, cost, cost[columns].sum()) for name, score in scores.items()}
            total = mass.sum(0)
            own = until(total / entries, total, total[columns].sum())
            plans["mass over entries, same mass"] = own
            heads.append((weights, values, total / entries, cost[own].sum()))
            for name, taken in plans.items():
                results.setdefault(name, []).append(measure(weights, values, taken, band, window))
        # The same density for the layer, by one threshold for all its heads.
        merged = np.concatenate([score for _, _, score, _ in heads])
        taken = until(merged, np.tile(cost, len(heads)), sum(spent for *_, spent in heads))
        for head, (weights, values, *_) in enumerate(heads):
            columns = taken[taken // length == head] % length
            found = measure(weights, values, columns, band, window)
            results.setdefault("one threshold a layer, so dense", []).append(found)
    print(f"{'score of a column':32} kept    5%      error   density")
    for name, found in results.items():
        print(f"{name:32}", *(f"{value:.4f} " for value in np.mean(found, 0)))


if len(sys.argv) < 2:
    sys.exit(__doc__)
main(sys.argv[1:])
