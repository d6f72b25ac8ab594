"""The event stream: every run emits its events in order, and sinks receive all of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import compress
from compress import RTN, ArtifactError, RecipeError
from compress.console import peaks
from compress.events import (
    BlockFinished,
    BlockStarted,
    Event,
    Fallback,
    RunFinished,
    RunStarted,
    WeightRewritten,
    fan_out,
    jsonl,
)  # fmt: skip


@pytest.fixture(scope="module")
def events(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    told: list[Event] = []
    compress.run(tiny_llama, [RTN(group=8)], tmp_path_factory.mktemp("run") / "out", emit=told.append)
    return told


def test_a_run_begins_and_ends(events: list[Event]) -> None:
    first, last = events[0], events[-1]
    assert isinstance(first, RunStarted)
    assert isinstance(last, RunFinished)
    assert (first.blocks, first.sites, first.steps) == (2, 14, ("rtn(group=8)",))
    assert last.fallbacks == 0
    assert 0 < last.artifact_bytes < last.source_bytes
    assert last.kl > 0


def test_blocks_are_told_in_order(events: list[Event]) -> None:
    told = [(type(e), e.index) for e in events if isinstance(e, (BlockStarted, BlockFinished))]
    assert told == [(BlockStarted, 0), (BlockFinished, 0), (BlockStarted, 1), (BlockFinished, 1)]


def test_every_site_is_told_inside_its_block(events: list[Event]) -> None:
    finished = next(i for i, e in enumerate(events) if isinstance(e, BlockFinished))
    early = [e.site for e in events[:finished] if isinstance(e, WeightRewritten)]
    assert len(early) == 7
    assert all(site.startswith("model.layers.0.") for site in early)


def test_drift_grows_from_block_to_block(events: list[Event]) -> None:
    drifts = [e.error for e in events if isinstance(e, BlockFinished)]
    assert 0 < drifts[0] < 1
    assert 0 < drifts[1] < 1


def test_a_fan_feeds_every_sink() -> None:
    left: list[Event] = []
    right: list[Event] = []
    event = Fallback(site="a", step="b", reason="c")
    fan_out([left.append, right.append])(event)
    assert left == right == [event]


def test_a_log_holds_one_object_a_line(events: list[Event], tmp_path: Path) -> None:
    sink = jsonl(tmp_path / "log.jsonl")
    [sink(event) for event in events]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == [type(event).__name__ for event in events]
    assert rows[0]["sites"] == 14


def test_a_log_on_a_full_disk_is_named() -> None:
    sink = jsonl(Path("/dev/full"))
    with pytest.raises(ArtifactError, match="--log: /dev/full cannot be written: No space left"):  # as for what resumes
        sink(Fallback(site="a", step="b", reason="c"))


@pytest.mark.parametrize("device", ["warp", "cuda:99", ""])
def test_a_device_this_machine_lacks_is_refused(device: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--device: .* is (unknown|not available on this machine)"):
        compress.run(tiny_llama, [RTN(group=8)], tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


def test_the_memory_of_a_gpu_is_told_where_there_is_one() -> None:
    on_cpu = RunFinished(
        out="o", source_bytes=1, artifact_bytes=1, bits_per_weight=4.0, kl=0.0, fallbacks=0, starved=0, seconds=1.0,
        peak_bytes=2_000_000_000,
    )  # fmt: skip
    assert peaks(on_cpu) == "2.00 GB"
    assert peaks(replace(on_cpu, gpu_peak_bytes=9_170_000_000)) == "2.00 GB, GPU 9.17 GB"
