"""Compares keys with hashes that LMCache's and vLLM's own code made."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pd_sidecar.kv.keys import ChunkHasher, HashError, keys
from pd_sidecar.kv.tags import adapter_tag, salt_tag

LINE = re.compile(r"PYTHONHASHSEED (\w+) (\w+) -> \w+ NONE_HASH (-?\d+) (\[.*\])")


def vectors():
    text = (Path(__file__).parent / "data" / "hash-vectors.txt").read_text()
    for seed, algorithm, _, expect in LINE.findall(text):
        yield (
            seed,
            algorithm,
            [entry.removesuffix("@bfloat16") for entry in ast.literal_eval(expect)],
        )


@pytest.mark.parametrize(("seed", "algorithm", "expect"), [v for v in vectors() if v[1] != "builtin"])
def test_chain_of_600_tokens(seed, algorithm, expect):
    environ = {} if seed == "None" else {"PYTHONHASHSEED": seed}
    assert ChunkHasher(algorithm, 256, environ).chain(range(600)) == expect


@pytest.mark.parametrize(("seed", "expect"), [(s, e) for s, a, e in vectors() if a == "builtin" and s != "None"])
def test_builtin_chain_in_a_process_with_that_seed(seed, expect):
    program = "from pd_sidecar.kv.keys import ChunkHasher;print(ChunkHasher('builtin', 256).chain(list(range(600))))"
    environ = {**os.environ, "PYTHONHASHSEED": seed}
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", program], env=environ, cwd=root, capture_output=True, check=True)
    assert ast.literal_eval(out.stdout.decode()) == expect


@pytest.mark.parametrize("environ", [{}, {"PYTHONHASHSEED": "random"}])
def test_builtin_without_a_seed_is_refused(environ):
    with pytest.raises(HashError, match="PYTHONHASHSEED"):
        ChunkHasher("builtin", 256, environ)


def test_unknown_algorithm_is_refused():
    with pytest.raises(HashError, match="md5"):
        ChunkHasher("md5", 256, {})


def test_a_prefix_has_the_same_hashes():
    hasher = ChunkHasher("sha256_cbor", 256, {})
    long, short = hasher.chain(list(range(1000))), hasher.chain(list(range(512)))
    assert long[:2] == short
    assert len(long) == 4
    assert hasher.chain([]) == []


def test_keys():
    assert keys("m", 2, 1, ["1f", "-2"], "half") == ["m@2@1@1f@half", "m@2@1@-2@half"]
    assert keys("m", 1, 0, ["1f"], "half", ["@salt%1"]) == ["m@1@0@1f@half@salt%1"]


def test_tags_tell_values_apart_and_do_not_show_them():
    # The values must not change, because during an upgrade the two sides run different releases.
    assert salt_tag("mine") == "@salt%37b36a774fc5a1e7292f47c7ffb97a82"
    assert adapter_tag("a", "w") == "@lora%fc8e06dba29a96a2826dee5f1bc78e83"
    tags = [salt_tag(""), salt_tag("mine"), salt_tag("mine "), salt_tag("\ud800"), adapter_tag("a", "bc")]
    assert len({*tags, adapter_tag("ab", "c"), adapter_tag("a", "bd")}) == 7
    secret = "my secret@x%y\n" * 100
    assert "secret" not in salt_tag(secret)
    assert len(salt_tag(secret)) == len(salt_tag(""))


@pytest.mark.parametrize("chunk", [1, 23, 24, 255, 256, 300])
def test_tokens_are_encoded_as_cbor_does_it(chunk):
    dumps = pytest.importorskip("cbor2").dumps
    tokens = [0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, *range(0, 200_000, 331)]
    for some in (tokens, tokens[:chunk], tokens[1::2], [], [2**32, 5], [-1, 5]):
        hasher = ChunkHasher("sha256_cbor", chunk, {})
        previous, expect = hasher._origin, []
        for start in range(0, len(some), chunk):
            value = (previous, tuple(some[start : start + chunk]), ())
            digest = hashlib.sha256(dumps(value, canonical=True)).digest()
            previous = int.from_bytes(digest[:8], "big")
            expect.append(f"{previous:x}")
        assert hasher.chain(some) == expect
