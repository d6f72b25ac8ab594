"""What was measured, as JSON lines, and the tables that are printed from them.

A line holds all runs of one job and is appended as soon as they are done. The last line of a job counts. Ratios are of
the medians, theirs over ours: above 1 ours is faster, or smaller.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from compress_evals.peers.score import Quality
from compress_evals.peers.subjects import SUBJECTS

MIB = 1 << 20
OURS = "ours"
TITLES = {"wanda": "Wanda 2:4", "sparsegpt": "SparseGPT 2:4", "gptq": "GPTQ int4 g128", "rtn": "RTN int4 g128"}
HEAD = ("job", "tool", "cpu s", "theirs / ours", "wall s", "peak over base, MiB", "theirs / ours", "no file's, MiB",
        "layer error", "worst", "KL")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Line:
    """One job of one tool: its runs as `job.py` tells them, what is left of the model, and the conditions."""

    subject: str
    tool: str
    task: str
    runs: list[dict[str, Any]]
    quality: Quality
    versions: dict[str, str]
    date: str
    cpu: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells a job from others."""
        return self.subject, self.task, self.tool

    def all(self, of: Callable[[dict[str, Any]], float]) -> list[float]:
        """A figure of each run."""
        return [of(run) for run in self.runs]


def cpu_of(run: dict[str, Any]) -> float:
    """Cpu seconds."""
    return float(run["cpu"])


def wall_of(run: dict[str, Any]) -> float:
    """Seconds that passed."""
    return float(run["wall"])


def peak_of(run: dict[str, Any]) -> float:
    """MiB that were resident at most, beyond the imports."""
    return float((run["peak"] - run["base"]) / MIB)


def anonymous_of(run: dict[str, Any]) -> float:
    """MiB of that which are no file's, so that nothing can take them back."""
    return float((run["anonymous_peak"] - run["anonymous_base"]) / MIB)


def append(path: Path, line: Line) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(line)) + "\n")


def read(path: Path) -> list[Line]:
    """The last line of each job, in the order of the tables; none if there is no file."""
    if not path.exists():
        return []
    told = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    last = {line.key: line for line in (Line(**{**each, "quality": Quality(**each["quality"])}) for each in told)}
    order = list(TITLES)
    subjects = [*SUBJECTS, *sorted({line.subject for line in last.values()} - set(SUBJECTS))]
    return sorted(last.values(), key=lambda one: (subjects.index(one.subject), order.index(one.task), one.tool != OURS))


def table(lines: Sequence[Line]) -> str:
    """The jobs of one subject beside ours."""
    tasks = list(lines[0].quality.scores)
    head = (*HEAD, *tasks)
    rows = [row(line, ours_of(line, lines), tasks) for line in lines]
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)])


def ours_of(line: Line, lines: Sequence[Line]) -> Line | None:
    """Our line of the same job."""
    return next((o for o in lines if (o.subject, o.task, o.tool) == (line.subject, line.task, OURS)), None)


def row(line: Line, ours: Line | None, tasks: Sequence[str]) -> list[str]:
    """The cells of a job."""
    found = line.quality
    cells = [TITLES[line.task], line.tool]
    cells += [spread(line.all(cpu_of)), ratio(line, ours, cpu_of), spread(line.all(wall_of))]
    cells += [spread(line.all(peak_of), 0), ratio(line, ours, peak_of), spread(line.all(anonymous_of), 0)]
    cells += [f"{found.error:.4f}", f"{found.worst:.4f}", f"{found.kl:.4f}"]
    return cells + [f"{100 * found.scores[task]:.1f} %" for task in tasks]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The median, and the range if there is one."""
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratio(line: Line, ours: Line | None, of: Callable[[dict[str, Any]], float]) -> str:
    """Their median over ours."""
    if ours is None or line is ours:
        return "1" if ours else ""
    return f"{median(line.all(of)) / median(ours.all(of)):.2f}"


def conditions(lines: Sequence[Line]) -> str:
    """When, on what and with what the lines were measured."""
    dates, cpus = sorted({line.date for line in lines}), sorted({line.cpu for line in lines})
    loads = [run["load"] for line in lines for run in line.runs]
    threads = sorted({run["threads"] for line in lines for run in line.runs})
    runs = sorted({len(line.runs) for line in lines})
    versions = sorted({(name, v) for line in lines for name, v in line.versions.items()})
    return (
        f"{dates[0]} to {dates[-1]}, {', '.join(cpus)}, threads {', '.join(map(str, threads))}, "
        f"load average {min(loads):.1f} to {max(loads):.1f}, runs of a job {runs[0]} to {runs[-1]}: median (range). "
        + ", ".join(f"{name} {v}" for name, v in versions)
        + "."
    )


def faults(lines: Sequence[Line]) -> list[str]:
    """What no figure of the table shows: a pattern that does not hold, or tensors touched that were to be left."""
    found = []
    for line in lines:
        if line.task in ("wanda", "sparsegpt") and not line.quality.two_of_four:
            found.append(f"{line.subject}, {TITLES[line.task]}, {line.tool}: 2:4 does not hold.")
        if not line.quality.rest:
            found.append(f"{line.subject}, {TITLES[line.task]}, {line.tool}: more than the blocks' matrices changed.")
    return found


def document(lines: Sequence[Line]) -> str:
    """All tables."""
    parts = [conditions(lines)]
    for subject in dict.fromkeys(line.subject for line in lines):
        parts.append(f"**{subject}**\n\n{table([line for line in lines if line.subject == subject])}")
    held = f"2:4 holds in every pruned matrix, and nothing but the blocks' matrices changed ({len(lines)} outputs)."
    return "\n\n".join([*parts, " ".join(faults(lines)) or held]) + "\n"
