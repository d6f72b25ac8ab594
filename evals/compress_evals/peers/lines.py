"""Stores peer measurements as JSON lines, and makes the tables that are printed from them.

A line holds all runs of one job and is appended as soon as they are done. If a job has several lines, the last one
counts. Ratios are of medians, the other tool's over that of Compress: above 1, Compress is faster or uses less memory.
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
HEAD = ("job", "tool", "cpu s", "theirs / ours", "wall s", "peak over base, MiB", "theirs / ours", "anonymous, MiB",
        "layer error", "worst", "KL")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Line:
    """One job of one tool: its runs as measured by `job.py`, the quality of its output, and the conditions."""

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
        """The identity of the job."""
        return self.subject, self.task, self.tool

    def all(self, of: Callable[[dict[str, Any]], float]) -> list[float]:
        """One figure of each run."""
        return [of(run) for run in self.runs]


def cpu_of(run: dict[str, Any]) -> float:
    """CPU seconds."""
    return float(run["cpu"])


def wall_of(run: dict[str, Any]) -> float:
    """Wall seconds."""
    return float(run["wall"])


def peak_of(run: dict[str, Any]) -> float:
    """Peak resident memory above the base (after imports), in MiB."""
    return float((run["peak"] - run["base"]) / MIB)


def anonymous_of(run: dict[str, Any]) -> float:
    """Peak anonymous memory above the base, in MiB: it is not file-backed, so the kernel cannot reclaim it."""
    return float((run["anonymous_peak"] - run["anonymous_base"]) / MIB)


def append(path: Path, line: Line) -> None:
    """Append a line to the file."""
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
    """The Markdown table of the jobs of one subject, each compared with Compress on the same job."""
    tasks = list(lines[0].quality.scores)
    head = (*HEAD, *tasks)
    rows = [row(line, ours_of(line, lines), tasks) for line in lines]
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)])


def ours_of(line: Line, lines: Sequence[Line]) -> Line | None:
    """The line of Compress for the same job; None if there is none."""
    return next((o for o in lines if (o.subject, o.task, o.tool) == (line.subject, line.task, OURS)), None)


def row(line: Line, ours: Line | None, tasks: Sequence[str]) -> list[str]:
    """The table cells of a job."""
    found = line.quality
    cells = [TITLES[line.task], line.tool]
    cells += [spread(line.all(cpu_of)), ratio(line, ours, cpu_of), spread(line.all(wall_of))]
    cells += [spread(line.all(peak_of), 0), ratio(line, ours, peak_of), spread(line.all(anonymous_of), 0)]
    cells += [f"{found.error:.4f}", f"{found.worst:.4f}", f"{found.kl:.4f}"]
    return cells + [f"{100 * found.scores[task]:.1f} %" for task in tasks]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The median, with the range in parentheses if there are several values."""
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratio(line: Line, ours: Line | None, of: Callable[[dict[str, Any]], float]) -> str:
    """The median of the other tool over that of Compress."""
    if ours is None or line is ours:
        return "1" if ours else ""
    return f"{median(line.all(of)) / median(ours.all(of)):.2f}"


def conditions(lines: Sequence[Line]) -> str:
    """The dates, hardware, load and versions of the measurements, as a sentence."""
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
    """Faults that no figure of the table shows: a violated 2:4 pattern, or changes outside the blocks' matrices."""
    found = []
    for line in lines:
        if line.task in ("wanda", "sparsegpt") and not line.quality.two_of_four:
            found.append(f"{line.subject}, {TITLES[line.task]}, {line.tool}: 2:4 does not hold.")
        if not line.quality.rest:
            found.append(f"{line.subject}, {TITLES[line.task]}, {line.tool}: more than the blocks' matrices changed.")
    return found


def document(lines: Sequence[Line]) -> str:
    """The conditions, the tables of all subjects, and the faults, as Markdown."""
    parts = [conditions(lines)]
    for subject in dict.fromkeys(line.subject for line in lines):
        parts.append(f"**{subject}**\n\n{table([line for line in lines if line.subject == subject])}")
    held = f"2:4 holds in every pruned matrix, and nothing but the blocks' matrices changed ({len(lines)} outputs)."
    return "\n\n".join([*parts, " ".join(faults(lines)) or held]) + "\n"
