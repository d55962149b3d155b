"""Tests the workers' half with block tables in which vLLM has replaced a needed block by the null block."""

from __future__ import annotations

import pytest
from test_worker import HASHES, TABLE, TOKENS, Rig, push

from pd_sidecar.kv.parts import GroupPart, Parts
from pd_sidecar.scheduler.metadata import LoadStart, PushStep
from pd_sidecar.sidecar import wire

WINDOW = 40
# The window before token 80 begins with token 41, in block 2.
FREED = [0, 0, 30, 11, 4]
LACKING = [0, 0, 0, 11, 4]


class GroupRig(Rig):
    def parts(self, pages):
        return Parts((GroupPart(0, "full", pages), GroupPart(1, "window", pages, WINDOW)))


@pytest.fixture
def rig(tmp_path):
    rig = GroupRig(tmp_path)
    yield rig
    rig.worker.close()


@pytest.mark.parametrize("window", [FREED, LACKING, FREED[:4]])
def test_a_push_without_a_needed_block_fails_and_its_blocks_are_free(rig, window):
    rig.step(push_starts=[push()], push_steps=[PushStep("a", (TABLE, window), True, TOKENS, is_whole=True)])
    rig.sender.next(wire.Reserve)
    rig.sender.say(wire.Granted("r", 0, [0, 1, 2], [0, 1, 2]))
    sent = rig.step(forward=False, finished=["a"])[0]
    sent |= set(rig.until(lambda: not rig.worker._senders[0]._by_req)[0])
    assert sent == {"a"}
    if window is FREED:
        assert rig.stats.data["saves"] == 1
        assert rig.sender.next(wire.Staged).chunks == [0, 1, 2]
    else:
        assert rig.stats.data["save_failures"] == {"no_block": 1}
        rig.sender.next(wire.Cancel)


@pytest.mark.parametrize("window", [FREED, LACKING, FREED[:4]])
def test_a_load_without_a_needed_block_fails_as_a_whole(rig, window):
    start = LoadStart("a", "r", HASHES, TOKENS, 0, TOKENS, (TABLE, window), TABLE)
    rig.step(load_starts=[start])
    rig.receiver.next(wire.Await)
    before = {name: tensor.clone() for name, tensor in rig.tensors.items()}
    rig.receiver.say(wire.Ready("r", 0, [0, 1, 2], [0, 1, 2]))
    _, received, failed = rig.until(lambda: not rig.worker._receivers[0]._by_req)
    assert received == ["a"]
    assert failed == ([] if window is FREED else ["a"])
    if window is not FREED:
        assert rig.stats.data["load_failures"] == {"no_block": 1}
        rig.receiver.next(wire.Abort)
        # Block 0 belongs to no request, and vLLM reads it in the place of freed blocks.
        assert all(bool((tensor[0] == before[name][0]).all()) for name, tensor in rig.tensors.items())
