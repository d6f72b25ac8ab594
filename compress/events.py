"""The events of a run, as values; printing and logging are sinks of this one stream.

Not here: what a user sees (`console.py` renders these). Times and memory are only in events, never in the
artifact, so that two runs with one seed write the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.errors import ArtifactError, RecipeError


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened during a run."""


Sink = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The plan is accepted and the walk begins; `untouched` counts the parameters left alone, by reason.

    `processes` is the number of processes that share the run.
    """

    model: str
    blocks: int
    sites: int
    steps: tuple[str, ...]
    calibration: str
    tokens: int
    untouched: dict[str, int]
    processes: int = 1


@dataclass(frozen=True, kw_only=True)
class RunResumed(Event):
    """The same run was stopped earlier, after block `done` of `count`; this one resumes there."""

    done: int
    count: int


@dataclass(frozen=True, kw_only=True)
class RunRestarted(Event):
    """The finished work of an earlier run cannot be used; the run starts again from the beginning."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class ResumeUnavailable(Event):
    """Blocks of this model pass on state that cannot be stored, so a killed run could not be resumed."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class RunInterrupted(Event):
    """The run ends incomplete; blocks up to `done` of `count` are kept, and the same run can be resumed from there."""

    done: int
    count: int


@dataclass(frozen=True, kw_only=True)
class ModelReshaped(Event):
    """A pass changed the model's shape; `change` says in words how.

    `parameters` and `blocks` are counts before and after.
    """

    step: str
    change: str
    parameters: tuple[int, int]
    blocks: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class BlockStarted(Event):
    """Block `index` of `count` is in memory."""

    block: str
    index: int
    count: int


@dataclass(frozen=True, kw_only=True)
class StatisticsCollected(Event):
    """The shared input of `sites` was measured over `tokens` tokens."""

    sites: tuple[str, ...]
    statistics: tuple[str, ...]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class WeightRewritten(Event):
    """One pass replaced one weight; errors are relative to the original weight.

    `weight_error` = |W' - W| / |W|; `output_error` = the same on the calibration inputs, given only for a site's last
    pass and if a Gram was collected. `seconds` is the time of the pass, divided equally among sites that it rewrote at
    once. `peak_bytes` is the peak memory of the process so far, so the peak was reached at the last site where it grew.
    """

    site: str
    step: str
    weight: str
    nbytes: int
    weight_error: float
    output_error: float | None
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Fallback(Event):
    """A pass could not do what was asked for at a site and did something weaker instead."""

    site: str
    step: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Starved(Event):
    """Fewer calibration tokens reached an expert than its statistics need, so a pass worked without them."""

    site: str
    step: str
    tokens: int
    needed: int


@dataclass(frozen=True, kw_only=True)
class BatchHalved(Event):
    """Memory ran out in a forward pass: from now on at most `windows` windows go through a block at once."""

    windows: int


@dataclass(frozen=True, kw_only=True)
class BlockFinished(Event):
    """The block is finished; `error` is how far the probe's hidden state has drifted from the dense model's.

    If a pass has changed the model's shape, the drift is measured from the reshaped model instead.
    """

    block: str
    index: int
    count: int
    error: float
    nbytes: int
    seconds: float
    peak_bytes: int
    gpu_peak_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class BlockRecorded(Event):
    """Block `done` is safe on disk: a run killed from now on resumes after it.

    `nbytes` is the size of the record, `seconds` the time that the run waited for it. Large states are written in
    parallel with the shards, so for them it is the time after the last shard.
    """

    done: int
    nbytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """The artifact is verified and in place; `kl` is the mean token KL(dense || compressed) on the probe, in nats."""

    out: str
    source_bytes: int
    artifact_bytes: int
    bits_per_weight: float
    kl: float
    fallbacks: int
    starved: int
    seconds: float
    peak_bytes: int
    gpu_peak_bytes: int = 0


def fan_out(sinks: list[Sink]) -> Sink:
    """One sink that passes every event to all of these."""

    def emit(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return emit


def jsonl(path: Path) -> Sink:
    """A sink that appends one JSON object per line to `path`; raises RecipeError if it cannot be opened.

    A line that cannot be written raises ArtifactError, after which a run can be resumed.
    """
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise RecipeError(f"--log: {path} cannot be written: {error.strerror}") from error

    def write(event: Event) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n")
        except OSError as error:  # not a RecipeError: a run could not be resumed after it
            raise ArtifactError(f"--log: {path} cannot be written: {error.strerror}") from error

    return write
