"""Tests the digests of LoRA adapters with real files, and the requests that use them."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest
from test_scheduler import Rig, load_params, output, push_params, request

from pd_sidecar.kv.keys import ChunkHasher
from pd_sidecar.scheduler import adapters
from pd_sidecar.scheduler.adapters import Adapters
from pd_sidecar.scheduler.eligibility import Skip
from pd_sidecar.scheduler.scheduler import Scheduler


def write(folder, weights=b"weights", config=b"{}"):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_bytes(config)
    return folder


def lora(folder, name="a", number=1, **more):
    return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=str(folder), load_inplace=False, **more)


def digest(known, of, bound_s=60.0):
    """Waits until the thread knows the digest or refuses the adapter."""
    deadline = time.monotonic() + bound_s
    while (found := known.digest(of)) is Skip.LORA_PENDING:
        assert time.monotonic() < deadline, "the thread is stuck"
        time.sleep(0.001)
    return found


def test_equal_files_have_equal_digests_and_the_engines_thread_reads_none(tmp_path, monkeypatch):
    a, b, other = write(tmp_path / "a"), write(tmp_path / "b"), write(tmp_path / "c", b"other")
    scaled = write(tmp_path / "d", config=b'{"lora_alpha": 2}')
    (b / "README.md").write_text("of no importance")
    known = Adapters()
    assert known.digest(lora(a)) is Skip.LORA_PENDING
    first = digest(known, lora(a))
    assert first == digest(known, lora(b)) == digest(Adapters(), lora(a, number=7))
    assert len({first, digest(known, lora(other)), digest(known, lora(scaled))}) == 3
    monkeypatch.setattr(adapters, "_digest", None)
    assert known.digest(lora(a)) == first, "it is taken once"


def test_files_that_change_while_they_are_served_end_the_transfers(tmp_path):
    folder, now = write(tmp_path / "a"), [0.0]
    known = Adapters(clock=lambda: now[0])
    first = digest(known, lora(folder))
    # Change the times but not the bytes, as a second download does.
    os.utime(folder / "adapter_model.safetensors", ns=(1, 1))
    now[0] += 2 * adapters.LOOK_S
    assert known.digest(lora(folder)) == first
    write(folder, b"weightz")
    deadline = time.monotonic() + 60
    while known.digest(lora(folder)) is not Skip.LORA:
        now[0] += 2 * adapters.LOOK_S
        assert time.monotonic() < deadline
    # The same adapter under another number: vLLM has loaded the new files.
    assert digest(known, lora(folder, number=2)) not in (first, Skip.LORA)
    assert known.digest(lora(folder)) is Skip.LORA


def test_what_cannot_be_told_apart_is_not_moved(tmp_path):
    (tmp_path / "empty").mkdir()
    known = Adapters()
    assert digest(known, lora(tmp_path / "empty")) is Skip.LORA
    assert digest(known, lora(tmp_path / "absent")) is Skip.LORA
    inplace = lora(write(tmp_path / "a"))
    inplace.load_inplace = True
    assert known.digest(inplace) is Skip.LORA
    # The thread still runs.
    assert isinstance(digest(known, lora(tmp_path / "a")), str)


class Fixed:
    """Takes the place of `Adapters`: knows every digest at once."""

    def digest(self, lora):
        return lora.digest


def keys_of(params, adapter, **more):
    rig = Rig()
    rig.scheduler = Scheduler(rig.scheduler._role, ChunkHasher("sha256_cbor", 32, {}), rig.stats, Fixed())
    req = request("a", params, lora_request=adapter, **more)
    rig.scheduler.matched_tokens(req, 0)
    rig.scheduler.allocated(req, ([1, 2, 3],), 39)
    metadata = rig.scheduler.step(output(new=[(req, [1, 2, 3], 0, 40)]))
    starts = [*metadata.push_starts, *metadata.load_starts]
    return [(start.hashes[0], start.tags[0]) for start in starts], rig.skipped(), metadata.dismissed


def test_name_and_weights_are_in_each_key():
    one = lora("", digest="1")
    pushed, skipped, _ = keys_of(push_params(), one)
    assert (len(pushed), skipped) == (1, {})
    assert pushed == keys_of(load_params(), lora("elsewhere", number=9, digest="1"))[0]
    others = [
        keys_of(load_params(), lora("", digest="2"))[0],
        keys_of(load_params(), lora("", name="b", digest="1"))[0],
        keys_of(load_params(), one, cache_salt="s")[0],
    ]
    assert pushed not in others
    assert len({tuple(keys) for keys in others}) == 3
    assert {keys[0][0] for keys in [pushed, *others]} == {pushed[0][0]}, "the hash is the tokens' alone"


@pytest.mark.parametrize("why", [Skip.LORA, Skip.LORA_PENDING])
def test_a_request_without_a_digest_is_computed(why):
    for params, dismissed in ((push_params(), []), (load_params(), ["r"])):
        assert keys_of(params, lora("", digest=why)) == ([], {why.value: 1}, dismissed)


def test_kv_that_lmcache_wrote_is_not_loaded_for_an_adapter():
    assert keys_of(load_params(written=True), lora("", digest="1")) == ([], {"lora": 1}, ["r"])
