#!/usr/bin/env bash
# Everything from a fresh clone to an answer: builds sattn, makes a small trained checkpoint, hides a pass key in three
# chapters of a novel and asks for it.
set -euo pipefail
cd "$(dirname "$0")/.."
./examples/checkpoint.sh target/checkpoint
cargo build --release
text=$(sed '/^Chapter 4$/,$d' examples/pride-and-prejudice.txt)
half=$(($(wc -l <<<"$text") / 2))
{
    head -n "$half" <<<"$text"
    printf '\nThe pass key is 71432. Remember it: 71432 is the pass key.\n\n'
    tail -n "+$((half + 1))" <<<"$text"
    printf '\n\nWhat is the pass key?\n'
} | ./target/release/sattn generate target/checkpoint/internlm2 --max-tokens 40 --attention default "$@"
