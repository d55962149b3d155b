"""Tests that vLLM's statistics add, encode and export the counters correctly."""

from __future__ import annotations

from pathlib import Path

import msgspec
import prometheus_client

from pd_sidecar.scheduler.eligibility import Skip
from pd_sidecar.scheduler.stats import BY_REASON, COUNTERS, PromMetrics, Stats


def some():
    stats = Stats()
    stats.add("loads")
    stats.add("load_bytes", 100)
    stats.add_reason("skipped", "lora")
    return stats


def test_sums_of_several_workers_and_steps():
    total = Stats()
    for _ in range(2):
        # Counters are encoded in this form between the engine and the API server.
        total = total.aggregate(Stats(msgspec.msgpack.decode(msgspec.msgpack.encode(some().data))))
    other = Stats()
    other.add_reason("skipped", "duplicate")
    total = total.aggregate(other)
    assert total.reduce() == {
        "loads": 2,
        "load_bytes": 200,
        "skipped_lora": 2,
        "skipped_duplicate": 1,
    }


def test_taken_sums_are_not_changed_by_what_follows():
    stats = some()
    taken = stats.take()
    stats.add_reason("skipped", "lora")
    assert taken.data["skipped"] == {"lora": 1}
    assert stats.take().data == {"skipped": {"lora": 1}}
    assert stats.take() is None


def test_prometheus():
    registry = prometheus_client.CollectorRegistry()

    def counter(**more):
        return prometheus_client.Counter(registry=registry, **more)

    metrics = PromMetrics(
        type("Config", (), {"kv_transfer_config": None}),
        dict.fromkeys((prometheus_client.Gauge, prometheus_client.Histogram)) | {prometheus_client.Counter: counter},
        ["model_name", "engine"],
        {0: ["m", "0"], 1: ["m", "1"]},
    )
    metrics.observe(some().data, 1)
    metrics.observe(some().data, 1)

    def value(name, **labels):
        return registry.get_sample_value(f"vllm:pd_sidecar_{name}_total", labels)

    assert value("loads", model_name="m", engine="1") == 2
    assert value("loads", model_name="m", engine="0") == 0
    assert value("skipped", model_name="m", engine="1", reason="lora") == 2


def test_every_counter_and_reason_is_documented():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for name in (*COUNTERS, *BY_REASON, *(skip.value for skip in Skip)):
        assert f"`{name}`" in readme, name
