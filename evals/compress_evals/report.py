"""Renders results as a table, as Markdown and as one self-contained HTML page.

Not here: the statistics, except for Holm's adjustment, which must cover every cell of the table that is shown, and the
geometry of the plots (`plots.py`). `report.html.j2` escapes all values, because model names and recipes are untrusted
input. The page has no script and loads no other file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compress.builtin.facts import TIERS
from compress.errors import ArtifactError
from compress_evals.noise import sentence
from compress_evals.plots import forest, scatter
from compress_evals.results import Comparison, Metric, Results, versus
from compress_evals.stats import Paired, detectable_effect, holm, verdict_text
from compress_evals.suite import FACTS
from compress_evals.wording import fenced, md, md_table, p_value, percent, points, size_change

GLYPHS = {"improved": "▲", "matching": "●", "drop": "▼", "fails": "✕", "inconclusive": "?"}
MEANINGS = {
    "improved": "the whole interval is above zero",
    "matching": "the whole interval is above the margin: whatever was lost is small enough",
    "drop": "there is a loss; whether it exceeds the margin is undecided",
    "fails": "the whole interval is below the margin",
    "inconclusive": "too few questions to decide; this does not mean that nothing was lost",
}
ASSUMED_FLIPS = 0.1  # between int4 (about 2 %) and 2:4 pruning (about 30 %) on the built-in model
SILENT = 0.1  # a drop in the share of questions that get an answer, from which on the report mentions it
_TEMPLATES = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One task of one compressed model against the dense one; scores and differences are fractions.

    `p` is adjusted by Holm's method over all rows of the table. `metric` and `dense_metric` are the two scores with
    their own intervals.
    """

    model: str
    task: str
    title: str
    family: str
    metric: Metric
    dense_metric: Metric
    paired: Paired
    p: float
    verdict: str

    @property
    def flips(self) -> str:
        """How many answers were lost and gained; a dash for scores that are not right or wrong."""
        return f"{self.paired.lost} / {self.paired.gained}" if self.paired.binary else "–"


def split(results: Sequence[Results]) -> tuple[Results, list[Results]]:
    """The dense result, which has no `vs`, and the compressed results compared with it, in order.

    Raises ArtifactError unless there is exactly one dense result, every other result was compared with it, and all
    names differ.
    """
    repeated = [name for name, times in Counter(result.model.name for result in results).items() if times > 1]
    if repeated:
        raise ArtifactError(f"two results are called {repeated[0]!r}: give each model its own name")
    dense = [result for result in results if result.vs is None]
    if len(dense) != 1:
        names = ", ".join(result.model.name for result in dense) or "none"
        raise ArtifactError(f"a report needs exactly one dense result; results without a comparison: {names}")
    compressed = [result for result in results if result.vs is not None]
    for result in compressed:
        check_reference(dense[0], result)
    return dense[0], compressed


def check_reference(dense: Results, compressed: Results) -> None:
    """Raise ArtifactError unless the stored comparison was made with this dense result, question by question."""
    known = compressed.vs is not None and compressed.vs.dense == dense.model.name
    ours = {task: result.task_hash for task, result in dense.tasks.items()}
    if not known or ours != {task: result.task_hash for task, result in compressed.tasks.items()}:
        raise ArtifactError(f"{compressed.model.name} was not compared with {dense.model.name}: compare them first")


def table_rows(results: Sequence[Results]) -> list[TableRow]:
    """One row per task and compressed model, as data for any output format; p values are adjusted over all rows."""
    dense, compressed = split(results)
    pairs = [(result, task, cell) for result in compressed for task, cell in versus(result).tasks.items()]
    adjusted = holm([cell.paired.p for _, _, cell in pairs])
    return [
        TableRow(
            model=result.model.name,
            task=task,
            title=cell.title,
            family=cell.family,
            metric=result.tasks[task].score,
            dense_metric=dense.tasks[task].score,
            paired=cell.paired,
            p=p,
            verdict=verdict_text(cell.paired),
        )
        for (result, task, cell), p in zip(pairs, adjusted, strict=True)
    ]


def markdown(results: Sequence[Results]) -> str:
    """The report as Markdown: the recipe and the task table of each model, then tiers and fidelity."""
    dense, compressed = split(results)
    parts = [f"# {md(headline(dense, compressed))}", md(header_line(dense))]
    parts += [f"- {md(line)}" for line in caveats(dense, compressed)]
    if not compressed:
        parts.append(md_table(("task", "n", "score"), [_score_cells(dense, task) for task in dense.tasks]))
    rows = table_rows(results)
    for result in compressed:
        parts += [f"## {md(result.model.name)}", md(facts_line(dense, result))]
        if result.model.recipe:
            parts.append(fenced(result.model.recipe))
        columns = ("task", "dense %", "compressed %", "difference, points", "lost / gained", "p (Holm)", "verdict")
        parts.append(md_table(columns, [_cells(row) for row in rows if row.model == result.model.name]))
        parts += [md(line) for line in (tally(result), noise_line(dense, result), speed_line(result)) if line]
    if compressed:
        parts += ["## By how often a fact was shown", md_table(*tier_table(dense, compressed))]
    if any(versus(result).fidelity for result in compressed):
        parts += ["## Fidelity to dense", md_table(*fidelity_table(compressed))]
    return "\n\n".join(parts) + "\n"


def html(results: Sequence[Results]) -> str:
    """The report as one HTML page with a light and a dark style, and with plots as inline SVG."""
    dense, compressed = split(results)
    rows = table_rows(results)
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "p_value": p_value}
    return environment.get_template("report.html.j2").render(
        title=headline(dense, compressed),
        header=header_line(dense),
        caveats=caveats(dense, compressed),
        dense=dense,
        dense_rows=[_score_cells(dense, task) for task in dense.tasks],
        cards=[_card(dense, result) for result in compressed],
        tables=[(result.model.name, [r for r in rows if r.model == result.model.name]) for result in compressed],
        matrix=_matrix(dense, compressed, rows),
        forests=[forest(result, 980 if len(compressed) == 1 else 560) for result in compressed],
        scatter=scatter(dense, compressed) if len(compressed) > 1 else None,
        tiers=tier_table(dense, compressed),
        fidelity=fidelity_table(compressed),
        glyphs=GLYPHS,
        meanings=MEANINGS,
        margin=versus(compressed[0]).margin if compressed else None,
        notes=[f"{result.model.name}: {note}" for result in compressed for note in versus(result).notes],
    )


# -- sentences and numbers -----------------------------------------------------------------------


def headline(dense: Results, compressed: Sequence[Results]) -> str:
    """The title of the report."""
    match compressed:
        case []:
            return f"What {dense.model.name} can do"
        case [one]:
            return f"What {one.model.name} lost compared with {dense.model.name}"
        case _:
            return f"What {len(compressed)} compressed versions lost compared with {dense.model.name}"


def header_line(dense: Results, clusters: Mapping[str, Sequence[str]] | None = None) -> str:
    """The number of questions, and the minimal detectable effect of the tasks with the most and the fewest subjects.

    The effect assumes that a tenth of the answers flip (ASSUMED_FLIPS), and those on one subject together: an upper
    bound, because questions about one subject are one cluster of every interval. `clusters` holds the cluster of every
    question by task where `dense` has no rows.
    """
    asked = clusters or {name: [row.cluster for row in rows] for name, rows in dense.rows.items()}
    counts = sorted(len(set(asked[name])) if name in asked else task.n for name, task in dense.tasks.items())
    shown = {n: detectable_effect(n, ASSUMED_FLIPS) for n in (counts[-1], counts[0])}
    effects = [f"{100 * effect:.1f} points ({n} subjects)" for n, effect in shown.items() if math.isfinite(effect)]
    return (
        f"{sum(task.n for task in dense.tasks.values()):,} questions in {len(dense.tasks)} tasks. "
        f"Minimal detectable effect at 80 % power, if {100 * ASSUMED_FLIPS:.0f} % of the answers flip, those on one "
        f"subject together: {' to '.join(effects) or 'none, too few subjects'}."
    )


def facts_line(dense: Results, result: Results) -> str:
    """One line with the sizes, bits and calibration of a compressed model."""
    parts = [size_change(dense.model.bytes_on_disk, result.model.bytes_on_disk)]
    if result.model.bits_per_weight is not None:
        parts.append(f"{result.model.bits_per_weight:.2f} bits per weight")
    parts.append(f"calibration: {calibration(result)}")
    return "; ".join(part for part in parts if part) + "."


def calibration(result: Results) -> str:
    """The recorded calibration of a model, with hashes shortened; "none recorded" if there is none."""
    recorded = result.model.calibration or {}
    shown = {
        key: str(value)[:12] if key in ("sha256", "hash") else str(value) for key, value in recorded.items() if value
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items()) or "none recorded"


def tally(result: Results) -> str:
    """The number of tasks with each verdict, and the family that kept least."""
    comparison = versus(result)
    counts = Counter(cell.paired.verdict for cell in comparison.tasks.values())
    words = ", ".join(f"{counts[verdict]} {verdict}" for verdict in GLYPHS if counts[verdict])
    return f"{words}. {worst(comparison)}"


def worst(comparison: Comparison) -> str:
    """The family that kept least of the dense score, as a sentence."""
    if comparison.worst is None:
        return "Dense scored nothing above chance: there was nothing to lose."
    return f"Worst family: {comparison.worst.family}, keeping {100 * comparison.worst.retained:.0f} % of dense."


def noise_line(dense: Results, result: Results) -> str:
    """A sentence on which tasks differ by no more than the dense model's noise; empty if that was not measured."""
    return sentence(dense.noise, {name: (cell.title, cell.paired) for name, cell in versus(result).tasks.items()})


def speed_line(result: Results) -> str:
    """A sentence on the generation speed of the model and of dense; empty if it was not timed."""
    speed = versus(result).speed
    if speed is None:
        return ""
    return (
        f"Generates {speed.compressed:.1f} tokens/s, dense {speed.dense:.1f}: {speed.ratio:.2f}x "
        f"({speed.low:.2f} to {speed.high:.2f} over {speed.runs} runs of {speed.prompt} + {speed.new} tokens)."
    )


def caveats(dense: Results, compressed: Sequence[Results]) -> list[str]:
    """The caveats that open the report.

    They name tasks that were not asked, with the reason, prompts that were cut to fit, a dense model at the level of
    chance, and compressed models that often give no answer.
    """
    skipped = [f"Not asked: {skip.title} ({skip.family}): {skip.reason}" for skip in dense.skipped.values()]
    cut = [f"{task.title} ({task.truncated} of {task.n})" for task in dense.tasks.values() if task.truncated]
    context = dense.engine.max_length
    long = [f"Longer than the context of {context:,} tokens, so cut: {'; '.join(cut)}"] if cut else []
    silent = [line for result in compressed if (line := silence(dense, result))]
    return [*skipped, *long, *ignorance(dense), *silent]


def silence(dense: Results, result: Results) -> str:
    """A sentence on the tasks where a model answers far fewer questions, right or wrong, than dense; empty if none."""
    told = []
    for name, task in dense.tasks.items():
        other = result.tasks.get(name)
        if other is None or not {"valid"} <= {*task.metrics} & {*other.metrics}:
            continue
        before, after = task.metrics["valid"].value, other.metrics["valid"].value
        if before - after >= SILENT:
            told.append(f"{task.title} ({100 * after:.0f} % of questions, dense {100 * before:.0f} %)")
    return (
        f"{result.model.name} often gives no answer, so its scores understate what it knows: {'; '.join(told)}"
        if told
        else ""
    )


def ignorance(dense: Results) -> list[str]:
    """A caveat if the dense model is not significantly above chance in half of the tasks or more; else empty."""
    counted = {name: task for name, task in dense.tasks.items() if not task.control}
    idle = [task for task in counted.values() if not task.headroom]
    if not idle or 2 * len(idle) < len(counted):
        return []
    ours = all(name.startswith(f"{FACTS.name}_") for name in counted)
    hint = f". `{FACTS.name}` asks what the built-in model was taught, --suite kick real questions of any model"
    return [
        f"{dense.model.name} is no better than chance in {len(idle)} of {len(counted)} tasks: there nothing can be "
        f"lost, and a verdict means nothing{hint if ours else ''}"
    ]


def cut_to_fit(dense: Results) -> list[str]:
    """For each task with prompts that were cut because the context is too short, a line with their number."""
    return [
        f"{task.title}: {task.truncated:,} of {task.n:,} prompts without their beginning"
        for task in dense.tasks.values()
        if task.truncated
    ]


def tier_table(dense: Results, compressed: Sequence[Results]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the built-in tasks' closed-book scores by how often a fact was shown in training."""
    shown = {
        name: task for name, task in dense.tasks.items() if task.family == "closed book" and {*task.tiers} & {*TIERS}
    }
    rows = []
    for name, task in shown.items():
        for result in (dense, *compressed):
            tiers = result.tasks[name].tiers
            cells = (f"{100 * tier.value:.1f} [{100 * tier.low:.1f}, {100 * tier.high:.1f}]" for tier in tiers.values())
            rows.append((task.title, result.model.name, *cells))
    tiers = next((task.tiers for task in shown.values()), {})
    return ("task", "model", *(f"{tier} (n={score.n})" for tier, score in tiers.items())), rows


def fidelity_table(compressed: Sequence[Results]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the fidelity measures, for the models for which they were measured."""
    header = (
        "model",
        "KL on text, nats/token",
        "KL p50 / p99",
        "same top token",
        "KL on answers",
        "same top token in answers",
        "bits per byte (not a quality metric)",
    )
    found = [(result.model.name, versus(result).fidelity) for result in compressed]
    return header, [
        (
            name,
            f"{f.kl.value:.4f} [{f.kl.low:.4f}, {f.kl.high:.4f}]{f' (top {f.top}: a lower bound)' if f.top else ''}",
            f"{f.kl_p50:.4f} / {f.kl_p99:.3f}",
            f"{100 * f.top1:.1f} %",
            f"{f.answer_kl.value:.4f} [{f.answer_kl.low:.4f}, {f.answer_kl.high:.4f}]",
            f"{100 * f.answer_top1:.1f} %",
            f"{f.dense_bits_per_byte:.3f} → {f.compressed_bits_per_byte:.3f}",
        )
        for name, f in found
        if f is not None
    ]


# -- parts ---------------------------------------------------------------------------------------


def _card(dense: Results, result: Results) -> dict[str, Any]:
    comparison = versus(result)
    counts = Counter(cell.paired.verdict for cell in comparison.tasks.values())
    return {
        "name": result.model.name,
        "size": size_change(dense.model.bytes_on_disk, result.model.bytes_on_disk),
        "bits": None if result.model.bits_per_weight is None else f"{result.model.bits_per_weight:.2f}",
        "calibration": calibration(result),
        "recipe": result.model.recipe,
        "sha": result.model.sha,
        "counts": [(verdict, counts[verdict]) for verdict in GLYPHS if counts[verdict]],
        "lines": [line for line in (worst(comparison), noise_line(dense, result), speed_line(result)) if line],
    }


def _matrix(
    dense: Results, compressed: Sequence[Results], rows: Sequence[TableRow]
) -> list[tuple[str, str, list[TableRow]]]:
    cells = {(row.model, row.task): row for row in rows}
    return [
        (task.title, f"{100 * task.score.value:.1f}", [cells[result.model.name, name] for result in compressed])
        for name, task in dense.tasks.items()
    ]


def _cells(row: TableRow) -> tuple[str, ...]:
    pair = row.paired
    verdict = f"{GLYPHS[pair.verdict]} {row.verdict}"
    return row.title, percent(row.dense_metric), percent(row.metric), points(pair), row.flips, p_value(row.p), verdict


def _score_cells(result: Results, task: str) -> tuple[str, str, str]:
    return result.tasks[task].title, str(result.tasks[task].n), percent(result.tasks[task].score)
