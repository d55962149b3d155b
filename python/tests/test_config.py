"""Tests the connector's options."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from pd_sidecar.options.config import ConfigError, Options, parse


def read(extra=None, *, producer=False, consumer=True, policy="recompute", model="org/model", **more):
    return parse(
        extra or {},
        producer=producer,
        consumer=consumer,
        load_failure_policy=policy,
        model=model,
        **more,
    )


def test_defaults(monkeypatch):
    monkeypatch.delenv("PD_SIDECAR_SOCKET", raising=False)
    options = read()
    assert options.model_name == "org/model"
    assert options.sender_socket.endswith("/sender.sock")
    assert options.receiver_socket.endswith("/receiver.sock")
    assert (options.chunk_size, options.hash_algorithm) == (256, "sha256_cbor")


def test_an_engine_of_both_roles_has_one_sidecar_of_both(monkeypatch):
    monkeypatch.delenv("PD_SIDECAR_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7/")
    options = read(producer=True, engine_id="one")
    assert options.sender_socket == options.receiver_socket
    assert re.fullmatch(r"/run/user/7/pd-sidecar/both-[0-9a-f]{12}\.sock", options.sender_socket)
    options = read({"sender_socket": "/s"}, producer=True)
    assert options.sender_socket == "/s"


def test_engines_that_start_their_sidecars_have_different_sockets(monkeypatch):
    monkeypatch.delenv("PD_SIDECAR_SOCKET", raising=False)
    first, second = (read({"sidecar": "spawn"}, engine_id=engine) for engine in ("one", "two"))
    assert first.receiver_socket != second.receiver_socket
    assert read({"sidecar": "spawn"}, engine_id="one") == first
    monkeypatch.setenv("PD_SIDECAR_SOCKET", "/s")
    assert read({"sidecar": "spawn"}, engine_id="one").receiver_socket == "/s"


@pytest.mark.parametrize(
    ("extra", "environ", "spawns"),
    [
        ({}, {}, True),
        ({"keep_ms": 5, "lmcache.pd_buffer_size": "1GiB"}, {}, True),
        ({"sender_socket": "/s"}, {}, False),
        ({}, {"PD_SIDECAR_SOCKET": "/s"}, False),
        ({}, {"LMCACHE_CONFIG_FILE": ""}, True),
    ],
)
def test_an_engine_of_both_roles_starts_its_sidecar_unless_one_is_named(extra, environ, spawns):
    assert read(extra, producer=True, environ=environ).sidecar == ("spawn" if spawns else "")
    assert read({"sender_socket": "/s"}, consumer=False, environ=environ).sidecar == ""


@pytest.mark.parametrize(
    ("host", "insecure", "starts"),
    [("localhost", "", True), ("::1", "", True), ("10.0.0.2", "", False), ("10.0.0.2", "on", True)],
)
def test_other_machines_reach_the_sidecar_only_with_consent(host, insecure, starts):
    environ = {"VLLM_NIXL_SIDE_CHANNEL_HOST": host, "PD_SIDECAR_INSECURE": insecure}
    if starts:
        read(producer=True, environ=environ)
    else:
        with pytest.raises(ConfigError, match="PD_SIDECAR_INSECURE=on"):
            read(producer=True, environ=environ)


def test_given_values_win():
    options = read({"receiver_socket": "/r", "model_name": "m", "idle_wait_ms": 0})
    assert (options.receiver_socket, options.model_name, options.idle_wait_ms) == ("/r", "m", 0)


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        read(
            {
                "sender_sokcet": "/x",
                "chunk_size": 0,
                "load_deadline_ms": "5",
                "save_deadline_ms": True,
                "idle_wait_ms": 51,
            },
            policy="fail",
            model="a@b",
        )
    keys = [re.match(r"\w+", problem)[0] for problem in caught.value.problems]
    assert keys == [
        "sender_sokcet",
        "load_deadline_ms",
        "save_deadline_ms",
        "chunk_size",
        "idle_wait_ms",
        "model_name",
        "kv_load_failure_policy",
    ]


@pytest.mark.parametrize(
    ("consumer", "policy", "allowed", "starts"),
    [
        (True, "recompute", False, True),
        (True, "fail", False, False),
        (True, "fail", True, True),
        (False, "fail", False, True),
    ],
)
def test_an_engine_that_loads_must_recompute(consumer, policy, allowed, starts):
    extra = {"allow_load_failure_policy_fail": allowed}
    if starts:
        read(extra, consumer=consumer, policy=policy)
    else:
        with pytest.raises(ConfigError, match="recompute"):
            read(extra, consumer=consumer, policy=policy)


def test_every_option_is_documented():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for field in fields(Options):
        assert f"| `{field.name}` |" in readme, field.name
