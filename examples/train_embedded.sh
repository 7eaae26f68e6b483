#!/usr/bin/env bash
# Trains the embedded model on an NVIDIA GPU, from nothing to a checkpoint folder. Needs Debian's apt-get and Python 3
# with venv for the text; more arguments go to the trainer.
set -euo pipefail
cd "$(dirname "$0")/.."
text=target/embedded-text
if [ ! -f "$text/tokenizer.model" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install -q --disable-pip-version-check sentencepiece==0.2.3
    "$work/venv/bin/python" examples/train_embedded/text.py "$text"
fi
cargo run --release -p long-context-examples --bin train-embedded --features cuda -- \
    --text "$text" --out weights/embedded "$@"
