"""What a user sees: progress lines and tables, rendered from events and results.

Everything goes through one rich console; nothing is computed or decided here.
"""

from __future__ import annotations

import math
import time
from typing import Any

from rich import markup
from rich.console import Console
from rich.table import Table

from compress.errors import visible
from compress.events import (
    BatchHalved,
    BlockFinished,
    BlockStarted,
    Event,
    Fallback,
    ModelReshaped,
    ResumeUnavailable,
    RunFinished,
    RunInterrupted,
    RunRestarted,
    RunResumed,
    RunStarted,
    Starved,
    WeightRewritten,
)
from compress.ledger import notes

VERDICT_STYLES = {"improved": "bold green", "matching": "green", "inconclusive": "yellow", "drop": "dark_orange"}


def escape(text: object) -> str:
    """A possibly untrusted string, escaped so that neither rich nor a terminal interprets any of it."""
    return markup.escape(visible(str(text)))


def size(count: float) -> str:
    """A number of bytes in readable units, powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def peaks(event: BlockFinished | RunFinished) -> str:
    """The peak memory of the host and, if one was used, of the GPU."""
    return size(event.peak_bytes) + (f", GPU {size(event.gpu_peak_bytes)}" if event.gpu_peak_bytes else "")


def change(before: float, after: float) -> str:
    """`2.40x smaller`, or `1.30x LARGER` if compression has failed its purpose."""
    return f"{before / after:.2f}x smaller" if after <= before else f"{after / before:.2f}x LARGER"


class Progress:
    """A sink that prints one line per block, with the estimated time left."""

    def __init__(self, console: Console) -> None:
        self.console, self.began = console, time.monotonic()
        self.resumed = 0  # blocks that an earlier run has finished
        self.errors: dict[str, float] = {}
        self.starved: dict[str, int] = {}  # in this block: expert's matrix -> tokens that reached it

    def __call__(self, event: Event) -> None:
        """Render an event."""
        match event:
            case RunStarted():
                together = f"; {event.processes} processes" if event.processes > 1 else ""
                self.console.print(
                    f"[bold]{escape(event.model)}[/]: {event.blocks} blocks, {event.sites} sites; "
                    f"{escape(' -> '.join(event.steps))}; calibration: {escape(event.calibration)}{together}"
                )
                left = ", ".join(f"{count:,} ({escape(reason)})" for reason, count in event.untouched.items())
                self.console.print(f"  [dim]parameters left alone: {left or 'none'}[/]")
                self.began = time.monotonic()
            case ModelReshaped():
                before, after = event.parameters
                self.console.print(
                    f"  {event.step}: {escape(event.change)}; {before:,} -> [bold]{after:,}[/] parameters"
                )
                self.began = time.monotonic()
            case RunResumed():
                self.console.print(f"  [bold]resuming after block {event.done} of {event.count}[/]")
                self.began, self.resumed = time.monotonic(), event.done
            case RunRestarted():
                self.console.print(f"  [bold yellow]starting again from the first block[/]: {escape(event.reason)}")
                self.resumed = 0
            case ResumeUnavailable():
                self.console.print(f"  [yellow]cannot be resumed if it is stopped[/]: {escape(event.reason)}")
            case RunInterrupted():
                self.console.print(
                    f"interrupted after block {event.done} of {event.count}; run the same command to resume"
                )
            case BlockStarted():
                self.errors, self.starved = {}, {}
            case Starved():
                self.starved[event.site] = event.tokens
            case WeightRewritten():
                self.errors[event.site] = event.weight_error if event.output_error is None else event.output_error
            case Fallback():
                self.console.print(
                    f"  [bold yellow]fallback[/] {escape(event.site)}: {event.step}: {escape(event.reason)}"
                )
            case BatchHalved():
                self.console.print(f"  [yellow]out of memory[/]: continues with {event.windows} windows at once")
            case BlockFinished():
                self.block(event)
            case RunFinished():
                self.finish(event)

    def block(self, event: BlockFinished) -> None:
        """Print the line of a finished block."""
        done = event.index + 1
        left = (time.monotonic() - self.began) / (done - self.resumed) * (event.count - done)
        if self.starved:
            fewest, most = min(self.starved.values()), max(self.starved.values())
            self.console.print(
                f"  [yellow]{len(self.starved)} experts' matrices[/] were reached by only {fewest} to {most} tokens, "
                "and treated without statistics"
            )
        worst = f"worst site {max(self.errors.values()):.3f}" if self.errors else "untouched"
        self.console.print(
            f"  block {done}/{event.count}  {worst}  drift {event.error:.3f}  {size(event.nbytes)}  "
            f"{event.seconds:.1f} s  peak {peaks(event)}  [dim]{left:.0f} s left[/]"
        )

    def finish(self, event: RunFinished) -> None:
        """Print the result of a run."""
        self.console.print(
            f"[bold green]verified[/] {size(event.source_bytes)} -> [bold]{size(event.artifact_bytes)}[/] "
            f"({change(event.source_bytes, event.artifact_bytes)}), "
            f"{event.bits_per_weight:.2f} bits a block weight; "
            f"probe KL {event.kl:.4g} nats; {event.fallbacks} fallbacks"
            f"{f'; {event.starved} starved' if event.starved else ''}; {event.seconds:.0f} s, "
            f"peak {peaks(event)}\n[bold]{escape(event.out)}[/]"
        )


def passes_table(rows: list[dict[str, Any]]) -> Table:
    """Every pass with its options."""
    table = Table(title="passes", show_lines=True)
    for column in ("pass", "what it does", "options (type, default)"):
        table.add_column(column, overflow="fold")
    for row in rows:
        options = "\n".join(
            f"[bold]{o['name']}[/]: {escape(o['type'])} = {escape(str(o['default']))}\n  [dim]{escape(o['help'])}[/]"
            for o in row["options"]
        )
        table.add_row(
            f"[bold]{row['name']}[/]", f"{escape(row['summary'])}\n[dim]Source: {escape(row['source'])}[/]", options
        )
    return table


def inspect_table(view: dict[str, Any]) -> list[Any]:
    """An artifact's facts and its sites."""
    table = Table(title=escape(view["path"]))
    for column in ("site", "weight", "bytes", "weight error", "output error", "tokens", "notes"):
        table.add_column(column, justify="left" if column in ("site", "weight", "notes") else "right")
    for name, row in view["sites"].items():
        output = "-" if row["output_error"] is None else f"{row['output_error']:.4f}"
        said = [*map(escape, notes(row)), *(mask_notes(row["mask"]) if "mask" in row else [])]
        table.add_row(
            escape(name), escape(row["weight"]), f"{row['bytes']:,}", f"{row['weight_error']:.4f}", output,
            str(row["tokens"]), ", ".join(said),
        )  # fmt: skip
    sizes = view["sizes"]
    divergence = f"; probe KL {view['probe']['kl']:.4g} nats" if view["probe"]["tokens"] else ""  # else not measured
    lines = [
        f"made from [bold]{escape(view['source'])}[/] by Compress {escape(view['version'])}; calibration: "
        f"{escape(view['calibration'])}",
        f"{size(sizes['source_bytes'])} -> [bold]{size(sizes['bytes'])}[/], "
        f"{sizes['bits_per_weight']:.2f} bits a block weight{divergence}",
        "untouched: " + ", ".join(f"{n:,} ({escape(reason)})" for reason, n in view["untouched"].items()),
    ]
    if view.get("base"):
        lines.insert(1, f"a delta of {escape(view['base']['name'])}; errors are relative to the difference")
    lines[1:1] = [escape(f"{step['change']} ({step['step']})") for step in view["reshaped"]]
    return [*([table] if view["sites"] else []), *lines]


def layers_table(timings: list[Any], notes: list[str]) -> list[Any]:
    """A table of compress.runtime.bench.LayerTiming, and notes on what is slower."""
    if not timings:
        return ["no site was rewritten; every layer is dense"]
    table = Table(title="layers, dense against compressed")
    left = ("sites", "weight", "rule", "computed")
    for name in ("sites", "weight", "out x in", "dense", "stored", "rule", "rows", "computed", "memory", "dense time",
                 "time", "dense/ours"):  # fmt: skip
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    before = None
    for row in timings:
        table.add_row(
            *(layer_cells(row.layer) if row.layer is not before else [""] * 6), str(row.rows), row.path,
            size(row.held_bytes), duration(row.dense.median), duration(row.compressed.median), ratio(row.speedup),
        )  # fmt: skip
        before = row.layer
    rounds = " to ".join(str(n) for n in sorted({min(r.rounds for r in timings), max(r.rounds for r in timings)}))
    lines = [
        "dense, stored: bytes of all these sites; memory: what the module of one keeps; times: medians of one call, "
        f"dense and compressed in turn; dense/ours: median of {rounds} pairs (their middle half), above 1 is faster",
        *(f"[yellow]{escape(note)}[/]" for note in notes),
    ]
    return [table, *lines]


def layer_cells(layer: Any) -> list[str]:
    """The cells that all rows of one compress.runtime.bench.Layer share."""
    return [
        f"{len(layer.sites)} x {escape(', '.join(layer.names))}", escape(layer.weight),
        " x ".join(map(str, layer.shape)), size(layer.dense_bytes), size(layer.stored_bytes), layer.rule,
    ]  # fmt: skip


def generation_table(timings: list[Any], title: str, notes: list[str]) -> list[Any]:
    """A table of compress.runtime.bench.GenerationTiming, the dense model first, and notes on what is worse."""
    table = Table(title=f"greedy generation, {escape(title)}")
    columns = ("model", "tokens/s (range)", "ours/dense", "prompt", "then tokens/s", "memory of weights", "of cache")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in timings:
        speed = row.tokens_per_second
        table.add_row(
            escape(row.name), f"{speed.median:.4g} ({speed.low:.4g}-{speed.high:.4g})",
            "-" if row is timings[0] else ratio(row.speedup), duration(row.prefill.median),
            f"{row.decode.median:.4g} ({row.decode.low:.4g}-{row.decode.high:.4g})", size(row.held_bytes),
            size(row.cache_bytes),
        )  # fmt: skip
    how = "steps replay a CUDA graph" if all(row.captured for row in timings) else "steps run without CUDA graphs"
    return [table, f"tokens/s counts the prompt; {how}", *(f"[yellow]{escape(note)}[/]" for note in notes)]


def ratio(found: Any) -> str:
    """A compress.runtime.bench.Spread of ratios."""
    return f"{found.median:.2f}x ({found.low:.2f}-{found.high:.2f})"


def duration(seconds: float) -> str:
    """A duration in readable units."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def mask_notes(mask: dict[str, Any]) -> list[str]:
    """How much a mask keeps, how unevenly, and how many rows and inputs it leaves empty."""
    low, high = mask["row"]
    notes = [f"keeps {mask['kept']:.1%}" + ("" if low == high else f", {low}-{high} a row")]
    notes += [f"{mask['empty_rows']} empty rows"] if mask["empty_rows"] else []
    return notes + ([f"{mask['empty_inputs']} inputs unused"] if mask["empty_inputs"] else [])


def survey_table(view: dict[str, Any]) -> list[Any]:
    """A model's sites by kind, and the rest."""
    total = sum(row["parameters"] for row in view["sites"])
    table = Table(title=escape(f"{view['path']}: sites of {view['family']}"))
    for column in ("sites", "shape [out, in]", "count", "parameters", "share"):
        table.add_column(escape(column), justify="left" if column == "sites" else "right", overflow="fold")
    for row in view["sites"]:
        table.add_row(
            escape(row["sites"]) + (" [dim](experts)[/]" if row["expert"] else ""),
            " x ".join(map(str, row["shape"])), f"{row['count']:,}", f"{row['parameters']:,}",
            f"{row['parameters'] / total:.1%}",
        )  # fmt: skip
    tested = (
        "covered by tests" if view["tested_family"] else "no test covers it; a run first proves that it can be walked"
    )
    files = "1 file" if view["files"] == 1 else f"{view['files']} files"
    stored = f", decoded from {view['decoded_from']}" if view["decoded_from"] else ""
    lines = [
        f"[bold]{escape(view['architecture'])}[/], family {escape(view['family'])} ({tested})",
        f"{view['blocks']} blocks, {view['dtype']}, {size(view['bytes'])} in {files}{stored}",
        "no pass touches: " + (", ".join(f"{n:,} ({escape(r)})" for r, n in view["untouched"].items()) or "nothing"),
    ]
    return [table, *lines]


def qid_table(found: Any) -> list[Any]:
    """A compress_evals.qid.Prediction: the cost of each bit width, the bits that a given loss needs, and caveats."""
    table = Table(
        title=f"predicted cost of quantization: {found.parameters:.4g} parameters without embeddings, "
        f"{found.tokens:.3g} training tokens"
    )
    reach = f"tokens at which it costs {found.loss:g}"
    for name in ("bits a weight", "nats a token lost", "likelihood lost", reach):
        table.add_column(name, justify="right")
    for row in found.rows:
        reached = "-" if row.tokens_for_loss is None else f"{row.tokens_for_loss:.3g}"
        mark = " (clamped)" if row.clamped else ""
        table.add_row(f"{row.bits:g}", f"{row.degradation:.3g}{mark}", f"{-math.expm1(-row.degradation):.0%}", reached)
    bits = found.bits_needed
    needed = f"{found.loss:g} nats need " + ("too many bits" if bits is None else f"{bits:.2f} bits: {math.ceil(bits)}")
    return [table, needed, *(f"[dim]- {escape(line)}[/]" for line in found.caveats)]


def fit_lines(found: Any, bits: str) -> list[str]:
    """A compress_evals.qid.Comparison: one line per law, with the exponents that the points could not identify."""
    lines = [f"fitted on {found.power.used} points, {found.power.dropped} dropped; bits are read from `{bits}`"]
    for name, law in (("power law", found.power), ("exponential in bits", found.exponential)):
        if law is None:
            lines.append(f"{name}: not fitted, bits do not vary")
            continue
        parts = [f"k {law.law.k:.4g}", *(exponent(law, part) for part in ("beta", "alpha", "gamma"))]
        held = (
            "not measurable, because a single point decides the fit"
            if law.held_out is None
            else f"x{math.exp(law.held_out):.2f}"
        )
        lines.append(f"[bold]{name}[/]: {'; '.join(parts)}; error x{math.exp(law.residual):.2f}, held out {held}")
    return lines


def exponent(fit: Any, name: str) -> str:
    """An exponent with its interval, or why it has none."""
    value = getattr(fit.law, name)
    if name not in fit.free:
        return f"{name} not identified, {'contained in k' if fit.law.curve == 'exponential' else f'kept at {value:g}'}"
    low_high = fit.intervals.get(name)
    return f"{name} {value:.3f}" + (f" ({low_high[0]:.3f} to {low_high[1]:.3f})" if low_high else "")


def quality_table(rows: list[Any], title: str) -> Table:
    """A table of tasks, dense against compressed; `rows` are the compress_evals.report.TableRow of one model."""
    table = Table(title=escape(title))
    for column in ("task", "dense %", "compressed %", "change, points (95 % CI)", "lost/gained", "p (Holm)", "verdict"):
        table.add_column(column, justify="left" if column in ("task", "verdict") else "right")
    for row in rows:
        pair = row.paired
        style = next((s for word, s in VERDICT_STYLES.items() if row.verdict.startswith(word)), "bold red")
        table.add_row(
            f"{escape(row.title)} [dim](n={pair.n})[/]", f"{100 * row.dense_metric.value:.1f}",
            f"{100 * row.metric.value:.1f}",
            f"{100 * pair.delta:+.1f} ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})", f"{pair.lost}/{pair.gained}",
            "<0.001" if row.p < 0.001 else f"{row.p:.3f}", f"[{style}]{escape(row.verdict)}[/]",
        )  # fmt: skip
    return table
