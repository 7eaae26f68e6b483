#!/usr/bin/env bash
# Everything from a fresh clone to an answer: builds sattn, makes a small checkpoint, asks it a question
# about three chapters of a novel.
set -euo pipefail
cd "$(dirname "$0")/.."
./examples/checkpoint.sh target/checkpoint
cargo build --release
question="${1:-Who has taken Netherfield Park?}"
{ cat examples/pride-and-prejudice.txt; printf '\n\nQuestion about the text above: %s\n' "$question"; } |
    ./target/release/sattn generate target/checkpoint/internlm2 --max-tokens 60
