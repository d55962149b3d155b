"""Checks that the sidecar of an engine that moves no KV learns the reason, and that no request waits for a transfer."""

from __future__ import annotations

import time

from fake_sidecar import PATIENCE_S, FakeSidecar
from test_worker import Rig, load, push

from pd_sidecar.options.config import Options
from pd_sidecar.scheduler.metadata import StepMetadata
from pd_sidecar.scheduler.stats import Stats
from pd_sidecar.worker.disabled import DisabledWorker
from pd_sidecar.worker.ranks import Part, Share


def wait_until(condition, seconds=PATIENCE_S):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_cannot_be_moved_fails_at_once_and_its_sidecars_know_why(tmp_path):
    stats = Stats()
    paths = {end: tmp_path / f"{end}.sock" for end in ("sender", "receiver")}
    sidecars = {end: FakeSidecar(path) for end, path in paths.items()}
    options = Options(sender_socket=str(paths["sender"]), receiver_socket=str(paths["receiver"]), model_name="m")
    worker = DisabledWorker(
        "layers.0: heads of two\nsizes",
        options,
        stats,
        engine="test",
        share=Share(2, (Part(1),)),
        producer=True,
        consumer=True,
    )
    wait_until(lambda: all(sidecar.hellos for sidecar in sidecars.values()))
    for end, role in (("sender", "prefill"), ("receiver", "decode")):
        (hello,) = sidecars[end].hellos
        assert (hello.role, hello.rank, hello.world_size) == (role, 1, 2)
        assert hello.unmoved == "layers.0: heads of two sizes"
        assert (hello.layout.model, hello.layout.layers) == ("m", 0)
    worker.begin(StepMetadata(push_starts=[push()], load_starts=[load(name="b")]))
    sent, results = worker.finish()
    assert (sent, results.received, set(results.failed)) == (set(), {"b"}, {"b"})
    worker.begin(StepMetadata(finished=["a"]))
    assert worker.finish()[0] == {"a"}
    assert stats.data == {"load_failures": {"layout": 1}, "save_failures": {"layout": 1}}
    assert worker.idle_report.unmoved
    # A restarted sidecar gets the reason again.
    sidecars["sender"].stop()
    again = FakeSidecar(paths["sender"])
    wait_until(lambda: again.hellos)
    assert again.hellos[0].unmoved
    worker.close()


def test_a_buffer_that_cannot_be_opened_leaves_the_sidecar_with_the_reason(tmp_path, monkeypatch):
    rig = Rig(tmp_path)
    link = rig.worker._links[0]
    monkeypatch.setattr(type(link.device), "copier", lambda *_: (_ for _ in ()).throw(OSError("no such handle")))
    rig.sender.stop()
    rig.sender = FakeSidecar(rig.paths["sender"])
    rig.until(lambda: len(rig.sender.hellos) == 2)
    assert [h.unmoved for h in rig.sender.hellos] == [
        "",
        "the sidecar's buffer cannot be used: no such handle",
    ]
    assert not link.client.connected
