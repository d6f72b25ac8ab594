"""What happens during a run, as values; printing and logging are sinks of this one stream.

Not here: what a user sees (`cli.py` renders these). Times and memory live only in events, never in the
artifact, so that two runs with one seed write the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened."""


Sink = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The plan is accepted and the walk begins; `untouched` counts the parameters left alone, by reason.

    `processes` work on it together.
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
    """An earlier run of the same was stopped behind block `done` of `count`; this one goes on from there."""

    done: int
    count: int


@dataclass(frozen=True, kw_only=True)
class RunRestarted(Event):
    """What an earlier run had done cannot be used, and is done again from the beginning."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class ResumeUnavailable(Event):
    """Blocks of this model leave something behind that cannot be stored: if the run is killed, it starts anew."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class RunInterrupted(Event):
    """The run ends before it is complete; blocks up to `done` of `count` are kept, the same run goes on from there."""

    done: int
    count: int


@dataclass(frozen=True, kw_only=True)
class ModelReshaped(Event):
    """A pass made a model of another shape; `parameters` and `blocks` before and after, and what went, for people."""

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

    `weight_error` = |W' - W| / |W|; `output_error` = the same through the calibration inputs, for a site's last pass
    and if a Gram was taken. `seconds` are the pass's, shared equally by sites that it rewrote at once; `peak_bytes` is
    the largest that the process has been, so the site at which it grew was the largest moment.
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
    """A pass could not do what was asked and did something weaker instead."""

    site: str
    step: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Starved(Event):
    """An expert was reached by fewer calibration tokens than statistics need, so a pass did without them."""

    site: str
    step: str
    tokens: int
    needed: int


@dataclass(frozen=True, kw_only=True)
class BatchHalved(Event):
    """Memory ran out in a forward: from now on at most so many calibration windows go through a block at once."""

    windows: int


@dataclass(frozen=True, kw_only=True)
class BlockFinished(Event):
    """The block is written; `error` is how far the probe's hidden state has drifted from the dense model's.

    Where a pass has made a model of another shape, from that one's.
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
    """From here on a killed run goes on behind block `done`: bytes of that, and the seconds that it was waited for.

    Large states are written beside the shards, so those are the seconds after the last shard.
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
    """One sink that feeds them all."""

    def emit(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return emit


def jsonl(path: Path) -> Sink:
    """A sink that appends one JSON object a line to `path`; raises RecipeError if it cannot be written."""
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise RecipeError(f"--log: {path} cannot be written: {error.strerror}") from error

    def write(event: Event) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n")

    return write
