"""Tests LMCache's own settings in the command line of an engine that was set up for LMCache."""

from __future__ import annotations

import pytest

from pd_sidecar.options import lmcache
from pd_sidecar.options.config import ConfigError, parse


def read(extra=None, environ=None):
    return parse(
        extra or {},
        producer=True,
        consumer=False,
        load_failure_policy="recompute",
        model="m",
        environ=environ or {},
    )


def keys_of(options):
    return options.hash_algorithm, options.chunk_size


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "lmcache.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_without_lmcache_our_defaults_hold():
    assert keys_of(read()) == ("sha256_cbor", 256)


@pytest.mark.parametrize("algorithm", ["sha256_cbor", "sha256", "builtin"])
def test_the_file_names_algorithm_and_chunk(file, algorithm):
    path = file(f"chunk_size: 128\npre_caching_hash_algorithm: {algorithm}\nlocal_cpu: False\n")
    options = read(environ={"LMCACHE_CONFIG_FILE": path, "PYTHONHASHSEED": "0"})
    assert keys_of(options) == (algorithm, 128)


def test_option_beats_lmcache_option_beats_variable_beats_file(file):
    environ = {"LMCACHE_CONFIG_FILE": file("pre_caching_hash_algorithm: sha256\n")}
    assert read(environ=environ).hash_algorithm == "sha256"
    environ |= {"LMCACHE_PRE_CACHING_HASH_ALGORITHM": "builtin", "LMCACHE_CHUNK_SIZE": "64"}
    environ["PYTHONHASHSEED"] = "0"
    assert keys_of(read(environ=environ)) == ("builtin", 64)
    extra = {"lmcache.pre_caching_hash_algorithm": "sha256_cbor", "lmcache.chunk_size": 32}
    assert keys_of(read(extra, environ)) == ("sha256_cbor", 32)
    extra |= {"hash_algorithm": "sha256", "chunk_size": 16}
    assert keys_of(read(extra, environ)) == ("sha256", 16)


def test_a_silent_file_means_lmcaches_default_which_needs_a_seed(file):
    path = file("enable_pd: True\n")
    seeded = {"LMCACHE_CONFIG_FILE": path, "PYTHONHASHSEED": "0"}
    assert read(environ=seeded).hash_algorithm == "builtin"
    with pytest.raises(ConfigError, match=r"does not set pre_caching.*needs PYTHONHASHSEED"):
        read(environ={"LMCACHE_CONFIG_FILE": path})
    with pytest.raises(ConfigError, match="needs PYTHONHASHSEED"):
        read({"hash_algorithm": "builtin"}, {"PYTHONHASHSEED": "random"})


def test_what_cannot_be_read_is_named(file):
    with pytest.raises(ConfigError, match="/nowhere"):
        read(environ={"LMCACHE_CONFIG_FILE": "/nowhere"})
    with pytest.raises(ConfigError, match="a mapping"):
        read(environ={"LMCACHE_CONFIG_FILE": file("- 1\n")})
    with pytest.raises(ConfigError, match=r"CHUNK_SIZE.*'big' is not"):
        read(environ={"LMCACHE_CHUNK_SIZE": "big"})
    with pytest.raises(ConfigError, match="'blake' is not one of"):
        read(environ={"LMCACHE_PRE_CACHING_HASH_ALGORITHM": "blake"})


def test_options_of_lmcaches_connector_are_taken():
    extra = {"discard_partial_chunks": False, "lmcache_rpc_port": "p1", "skip_last_n_tokens": 1}
    assert keys_of(read(extra)) == ("sha256_cbor", 256)


def test_lmcache_options_go_to_a_spawned_sidecar_only():
    extra = {"lmcache.pd_buffer_size": 1 << 30, "lmcache.pd_peer_init_port": [7300, 7301]}
    with pytest.raises(ConfigError, match=r"pd_buffer_size.*configures the sidecar"):
        read(extra)
    read(extra | {"sidecar": "spawn"})
    assert lmcache.variables(extra | {"sidecar": "spawn", "lmcache.enable_pd": True}) == {
        "LMCACHE_PD_BUFFER_SIZE": "1073741824",
        "LMCACHE_PD_PEER_INIT_PORT": "7300,7301",
        "LMCACHE_ENABLE_PD": "true",
    }
