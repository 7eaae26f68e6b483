#!/usr/bin/env bash
# Writes six novels of Jane Austen as plain text into the folder given, to hide keys in and to measure perplexity on.
# They come from the Debian package r-cran-janeaustenr; needs apt-get and Python 3.
set -euo pipefail
out=${1:?a folder}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq r-cran-janeaustenr 2>/dev/null || { apt-get update -qq && apt-get download -qq r-cran-janeaustenr; }
dpkg -x r-cran-janeaustenr_*.deb .
python3 - usr/lib/R/site-library/janeaustenr/data/Rdata.rdb "$out" <<'PYTHON'
import re
import sys
import zlib
from pathlib import Path

# R keeps each object as its length and a zlib stream; in it every line is a marker, a length and the bytes.
LINE = re.compile(rb"\x00\x04\x00\x09(....)", re.S)
data = Path(sys.argv[1]).read_bytes()
while data:
    stream = zlib.decompressobj()
    content = stream.decompress(data[4:])
    data = stream.unused_data
    sizes = [(found.end(), int.from_bytes(found[1], "big")) for found in LINE.finditer(content)]
    lines = [content[start : start + size].decode() for start, size in sizes]
    # A novel's first line is its title.
    name = lines[0].lower().replace(" ", "-")
    Path(sys.argv[2], f"{name}.txt").write_text("\n".join(lines) + "\n")
PYTHON
ls "$out"
