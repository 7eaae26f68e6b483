#!/usr/bin/env python3
"""The training text and its tokenizer, from two Debian packages of public-domain books.

  text.py FOLDER [VOCABULARY]     (needs: apt-get and dpkg; pip install sentencepiece)

writes into FOLDER
  train.txt         five novels by Jane Austen and the King James Bible, one paragraph a line
  held-out.txt      Pride and Prejudice, on which nothing is trained
  tokenizer.model   SentencePiece of the training text: BPE, byte fallback, digits one by one; 2048 tokens,
                    or as many as asked for (the tests' own, fixtures/tokenizer.model, has 600)
"""
import io
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import sentencepiece

PACKAGES = ["r-cran-janeaustenr", "bible-kjv", "bible-kjv-text"]
HELD_OUT = "PRIDE AND PREJUDICE"
CHARACTER_VECTOR, STRING = 16, 9


def unpack(folder):
    """The packages' files below `folder`; nothing is installed."""
    subprocess.run(["apt-get", "download", "-qq", *PACKAGES], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder / "root"], check=True)
    return folder / "root"


def character_vector(data):
    """The strings of a serialized R character vector (XDR, version 3)."""
    encoding_length = struct.unpack_from(">i", data, 14)[0]
    at = 18 + encoding_length
    kind, count = struct.unpack_from(">ii", data, at)
    if data[:2] != b"X\n" or kind & 0xFF != CHARACTER_VECTOR:
        raise ValueError("found something else, expected a character vector of R")
    at += 8
    strings = []
    for _ in range(count):
        kind, length = struct.unpack_from(">ii", data, at)
        if kind & 0xFF != STRING:
            raise ValueError(f"found an R object of kind {kind & 0xFF}, expected a string")
        at += 8
        strings.append(data[at : at + max(length, 0)].decode())
        at += max(length, 0)
    return strings


def novels(root):
    """The lines of each novel: the package's data base holds one compressed object after another."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while data:
        stream = zlib.decompressobj()
        yield character_vector(stream.decompress(data[4:]))
        data = stream.unused_data


def paragraphs(lines):
    """One paragraph a line, without the marks of emphasis."""
    blocks = "\n".join(line.strip() for line in lines).split("\n\n")
    joined = (" ".join(block.split()).replace("_", "") for block in blocks)
    return "\n".join(block for block in joined if block) + "\n"


def bible(root):
    """Every chapter as one paragraph, without the numbers of its verses."""
    command = [root / "usr/bin/bible", "-p", root / "usr/lib", "-f", "gen1:1-rev22:21"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    chapters = {}
    for chapter, verse in re.findall(r"^(\d?[A-Za-z]+\d+):\d+ (.*)$", text, re.MULTILINE):
        chapters.setdefault(chapter, []).append(verse)
    return [" ".join(verses) + "\n" for verses in chapters.values()]


def make_tokenizer(text, vocabulary):
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=output, model_type="bpe", vocab_size=vocabulary,
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", num_threads=1, pad_id=-1,
        remove_extra_whitespaces=False, split_digits=True, add_dummy_prefix=True, max_sentence_length=1 << 20,
        control_symbols=["<|im_start|>", "<|im_end|>"], minloglevel=2,
    )
    return output.getvalue()


def main():
    folder = Path(sys.argv[1])
    vocabulary = int(sys.argv[2]) if len(sys.argv) > 2 else 2048
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        root = unpack(Path(work))
        books = [paragraphs(lines) for lines in novels(root)]
        chapters = bible(root)
    train = "".join([book for book in books if not book.startswith(HELD_OUT)] + chapters)
    (folder / "train.txt").write_text(train)
    (folder / "held-out.txt").write_text("".join(book for book in books if book.startswith(HELD_OUT)))
    (folder / "tokenizer.model").write_bytes(make_tokenizer(train, vocabulary))


main()
