"""`python -m compress_evals.llm_kick SWEEP`: tests which of LLM-KICK's findings hold on the model of a sweep.

Not here: the evaluation itself. Each finding has a rule that decides whether it holds; the rules were written before
the sweep was run. The tasks of a family are pooled question by question, with their clusters kept. All intervals are
95 % confidence intervals and are not corrected for multiple comparisons. For a sweep with several seeds, figures are
means over runs, runs with the same seed are compared with each other, and the intervals include the spread between
runs.
Source: Jaiswal et al., "Compressing LLMs: The Truth is Rarely Pure and Never Simple", ICLR 2024.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.errors import ArtifactError, CompressError, RecipeError
from compress.recipe import Recipe, from_dict, parse
from compress_evals import stats
from compress_evals.leaderboard.collect import Board, Entry, collect
from compress_evals.leaderboard.runs import side_by_side, together

CURVES = ("magnitude", "wanda", "sparsegpt")
CLOSED = ("closed book",)
KEPT = ("matching", "improved")
FEWEST = 4  # levels that a method needs to have a curve
HOLDS, PARTLY, NOT, OPEN_QUESTION = "holds", "holds in part", "does not hold", "cannot be told"


@dataclass(frozen=True, kw_only=True)
class Level:
    """One sweep cell: a method at one setting (sparsity, N:M pattern or bits), and its calibration."""

    entry: Entry
    setting: float | str
    samples: int
    data: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A published claim, the rule that decides it here, what was measured, and the decision."""

    title: str
    published: str
    rule: str
    measured: tuple[str, ...]
    verdict: str


class Cells:
    """The cells of one board by method; only recipes of one pass, and only seed 0 where runs are not merged."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.levels: dict[str, list[Level]] = {}
        for entry in board.compressed:
            recipe = _recipe(entry)
            if recipe is None or len(recipe.passes) != 1 or (recipe.calibration.seed and not entry.runs):
                continue
            [step] = recipe.passes
            setting = getattr(step, "sparsity", None)
            plain = setting is not None and step == type(step)(**{"sparsity": setting})
            setting = setting if plain else getattr(step, "bits", None)
            if setting is not None:
                made = Level(
                    entry=entry,
                    setting=setting,
                    samples=recipe.calibration.samples,
                    data=recipe.calibration.data,
                )
                self.levels.setdefault(step.name, []).append(made)

    def curves(self, *families: str) -> list[str]:
        """The methods with at least FEWEST levels; none if one of the families was not asked."""
        if not all(self.tasks([family]) for family in families):
            return []
        return [method for method in CURVES if len(self.curve(method)) >= FEWEST]

    def curve(self, method: str) -> list[Level]:
        """The unstructured levels of a method at the default calibration, by rising sparsity, one entry per level."""
        found = {
            float(level.setting): level
            for level in self.levels.get(method, ())
            if isinstance(level.setting, float) and (level.samples, level.data) == (128, "mixed")
        }
        return [found[key] for key in sorted(found)]

    def at(self, method: str, setting: float | str, samples: int = 128, data: str = "mixed") -> Entry | None:
        """The cell of one setting; None if the sweep does not have it."""
        for level in self.levels.get(method, ()):
            if (level.setting, level.samples, level.data) == (setting, samples, data):
                return level.entry
        return None

    def tasks(self, families: Sequence[str]) -> list[str]:
        """The tasks of the given families, except controls."""
        tasks = self.board.dense.results.tasks
        return [name for name, task in tasks.items() if task.family in families and not task.control]

    def pooled(self, one: Entry, families: Sequence[str], against: Entry | None = None) -> stats.Paired:
        """The paired comparison of one cell with dense, or with another cell, over all questions of some families."""
        return self.over(one, self.tasks(families), against)

    def over(self, one: Entry, tasks: Sequence[str], against: Entry | None = None) -> stats.Paired:
        """The same over some tasks; raises ArtifactError if both cells have several runs but no seed in common."""
        other = self.board.dense if against is None else against
        pairs = side_by_side(one, other)
        if not pairs:
            raise ArtifactError(f"{one.name} and {other.name} were calibrated with different seeds")
        after, before = (
            np.stack([np.concatenate([entry.scores[task] for task in tasks]) for entry in side])
            for side in zip(*pairs, strict=True)
        )
        clusters = [cluster for task in tasks for cluster in self.board.clusters[task]]
        return stats.paired_runs(before, after, clusters, self.board.margin)[0]

    def reach(self, method: str, tasks: Sequence[str]) -> tuple[float, float | None]:
        """The largest sparsity up to which every level matches on the tasks, and the first that fails (None: never)."""
        kept, going = 0.0, True
        for level in self.curve(method):
            verdict = self.over(level.entry, tasks).verdict
            going = going and verdict in KEPT
            if going:
                kept = float(level.setting)
            if verdict == "fails":
                return kept, float(level.setting)
        return kept, None


def findings(board: Board) -> list[Finding]:
    """All findings; one that the cells of the board cannot decide has the verdict OPEN_QUESTION."""
    cells = Cells(board)
    return [
        perplexity(cells),
        reaches_at_most(
            cells, "closed book", 0.3, "Closed-book questions fail early",
            "no method matches the dense model on factoid questions beyond 20 to 25 %; they fail from 30 to 35 %",
        ),
        n_of_m(cells),
        eight_bits(cells),
        outlasts(
            cells, "choice", "Multiple choice breaks later than recall",
            "MMLU matches to 20 to 40 %, factoid questions to 20 to 25 %", matches=True,
        ),
        outlasts(
            cells, "open book", "Pruned models are better at finding than at knowing",
            "in-context retrieval matches to 40 to 50 % (its scorer gives 100 % to a model that prints dots)",
            matches=True,
        ),
        outlasts(
            cells, "summaries", "Summaries hold longer than facts",
            "in-context summarization stays good where factoid questions have failed", matches=False,
        ),
        lengths(cells),
        reaches_at_most(
            cells, "instructions", 0.3, "Instructions are followed less from a quarter on",
            "instruction following matches to about 25 %",
        ),
        criteria(cells),
        samples(cells),
        repetition(cells),
    ]  # fmt: skip


def perplexity(cells: Cells) -> Finding:
    """The finding that perplexity hardly changes while knowledge is lost."""
    lines, rises = [], []
    for method in cells.curves("closed book"):
        kept, fails = cells.reach(method, cells.tasks(CLOSED))
        entry = None if fails is None else cells.at(method, fails)
        if entry is None or entry.results.vs is None or entry.results.vs.fidelity is None:
            lines.append(f"{method}: closed book {reaches(kept, fails)}")
            continue
        found = entry.results.vs.fidelity
        change = found.bits_per_byte_difference
        rises.append(change.value / found.dense_bits_per_byte)
        pair = cells.pooled(entry, CLOSED)
        lines.append(
            f"{method}: closed book matches to {kept:.0%} and fails from {fails:.0%} ({points(pair)}), where bits per "
            f"byte are {found.dense_bits_per_byte:.3f} -> {found.compressed_bits_per_byte:.3f} "
            f"({change.low:+.3f} to {change.high:+.3f}; {rises[-1]:+.1%})"
        )
    return Finding(
        title="Perplexity hides what was lost",
        published="perplexity hardly moves up to 45 to 60 % removed, while factoid questions fail from 30 to 35 %",
        rule="where closed book first fails, bits per byte have risen by less than 5 %",
        measured=tuple(lines),
        verdict=decided([rise < 0.05 for rise in rises]),
    )


def reaches_at_most(cells: Cells, family: str, most: float, title: str, published: str) -> Finding:
    """The finding that a family matches the dense model up to at most the sparsity `most`, under every method."""
    reached = {method: cells.reach(method, cells.tasks([family])) for method in cells.curves(family)}
    return Finding(
        title=title,
        published=published,
        rule=f"the family {family!r} matches to no more than {most:.0%}",
        measured=tuple(f"{method}: {reaches(*found)}" for method, found in reached.items()),
        verdict=decided([kept <= most for kept, _ in reached.values()]),
    )


def n_of_m(cells: Cells) -> Finding:
    """The finding that N:M patterns lose half of the knowledge."""
    lines, fails, halves = [], [], []
    for method in CURVES:
        for pattern in ("2:4", "4:8"):
            entry = cells.at(method, pattern)
            if entry is None or not cells.tasks(CLOSED):
                continue
            pair = cells.pooled(entry, CLOSED)
            fails.append(pair.verdict == "fails")
            halves.append(pair.compressed <= 0.5 * pair.dense)
            kept = pair.compressed / pair.dense if pair.dense else 0.0
            lines.append(f"{method} {pattern}: {points(pair)}, {kept:.0%} kept, {pair.verdict}")
    lines.append(f"at least half is lost in {sum(halves)} of {len(halves)}")
    return Finding(
        title="N:M patterns never match",
        published="2:4 and 4:8 lose 50 % and more on factoid questions, and match on no task",
        rule="closed book fails under every N:M pattern",
        measured=tuple(lines),
        verdict=decided(fails),
    )


def eight_bits(cells: Cells) -> Finding:
    """The finding that 8-bit weights lose 8 to 10 % of factoid answers."""
    found = [(method, cells.at(method, 8)) for method in ("rtn", "gptq", "hqq")]
    asked = [(method, entry) for method, entry in found if entry is not None and cells.tasks(CLOSED)]
    pairs = [(method, cells.pooled(entry, CLOSED)) for method, entry in asked]
    return Finding(
        title="Even 8 bits cost knowledge",
        published="8-bit weights lose 8 to 10 % of factoid answers (relative)",
        rule="the interval of the closed-book loss lies beyond 5 % of the dense score",
        measured=tuple(f"{method}, 8 bits: {points(pair)}, {pair.verdict}" for method, pair in pairs),
        verdict=decided([pair.verdict == "fails" for _, pair in pairs]),
    )


def outlasts(cells: Cells, family: str, title: str, published: str, *, matches: bool) -> Finding:
    """The finding that a family fails no earlier than closed book, under every method.

    With `matches` it must also match the dense model up to at least the same sparsity.
    """
    lines, later = [], []
    for method in cells.curves(*CLOSED, family):
        closed, other = (cells.reach(method, cells.tasks(families)) for families in (CLOSED, [family]))
        later.append((other[1] or 1.0) >= (closed[1] or 1.0) and (not matches or other[0] >= closed[0]))
        lines.append(f"{method}: {family}: {reaches(*other)}; closed book: {reaches(*closed)}")
    further = "matches at least as far, and " if matches else ""
    return Finding(
        title=title,
        published=published,
        rule=f"the family {family!r} {further}fails no earlier than closed book, under every method",
        measured=tuple(lines),
        verdict=decided(later),
    )


def lengths(cells: Cells) -> Finding:
    """The finding that longer contexts break first."""
    tasks = [
        t for t in ("facts_context1", "facts_context3", "facts_context8", "facts_long") if t in cells.board.clusters
    ]
    lines, falling = [], []
    for method in CURVES:
        entry = cells.at(method, 0.5)
        if entry is None or len(tasks) < 2:
            continue
        pairs = [cells.over(entry, [task]) for task in tasks]
        kept = [pair.compressed / pair.dense if pair.dense else 0.0 for pair in pairs]
        falling.append(kept[-1] < kept[0])
        shown = ", ".join(f"{share:.0%}" for share in kept)
        lines.append(f"{method} at 50 %: of what dense answers among 1, 3, 8 and 16 facts {shown} are kept")
    return Finding(
        title="The longer the context, the sooner it breaks",
        published="long stories lose coherence first",
        rule="at 50 % less is kept of the longest context than of the shortest, under every method",
        measured=tuple(lines),
        verdict=decided(falling),
    )


def criteria(cells: Cells) -> Finding:
    """The finding that calibrated pruning criteria beat magnitude at 50 % sparsity."""
    magnitude = cells.at("magnitude", 0.5)
    lines, better = [], []
    for method in ("wanda", "sparsegpt"):
        entry = cells.at(method, 0.5)
        if entry is not None and magnitude is not None and cells.tasks(CLOSED):
            pair = cells.pooled(entry, CLOSED, magnitude)
            better.append(pair.low > 0)
            lines.append(f"{method} against magnitude, 50 %, closed book: {points(pair)}, p = {pair.p:.2g}")
    return Finding(
        title="Wanda and SparseGPT beat magnitude",
        published="at 50 % factoid questions: magnitude 14.0, SparseGPT 42.9, Wanda 44.7 %",
        rule="both keep more closed-book answers at 50 %, the whole interval above zero",
        measured=tuple(lines),
        verdict=decided(better),
    )


def samples(cells: Cells) -> Finding:
    """The finding that more calibration data helps SparseGPT but not Wanda."""
    found = {}
    for method in ("wanda", "sparsegpt"):
        few, many = (cells.at(method, 0.7, count) for count in (8, 128))
        if few is not None and many is not None and cells.tasks(CLOSED):
            found[method] = cells.pooled(many, CLOSED, few)
    helped = {method: pair.low > 0 for method, pair in found.items()}
    known = len(helped) == 2
    return Finding(
        title="Calibration matters for SparseGPT, not for Wanda",
        published="the number of calibration samples matters for SparseGPT, most at 70 %, and little for Wanda",
        rule="128 windows instead of 8 help SparseGPT at 70 % on closed book (whole interval above zero) and not Wanda",
        measured=tuple(f"{m}, 128 windows against 8: {points(p)}, p = {p.p:.2g}" for m, p in found.items()),
        verdict=decided([helped["sparsegpt"], not helped["wanda"]]) if known else OPEN_QUESTION,
    )


def repetition(cells: Cells) -> Finding:
    """The finding that compressed models repeat themselves."""
    lines, more = [], []
    dense = cells.board.dense.results.tasks.get("facts_generate")
    for method in CURVES:
        for share in (0.7, 0.8):
            entry = cells.at(method, share)
            if entry is None or dense is None:
                continue
            metric = entry.results.tasks["facts_generate"].metrics["degenerate"]
            more.append(metric.low > dense.metrics["degenerate"].high)
            lines.append(
                f"{method} {share:.0%}: {metric.value:.0%} of answers are stuck "
                f"({metric.low:.0%} to {metric.high:.0%}; dense {dense.metrics['degenerate'].value:.0%})"
            )
    return Finding(
        title="Compressed models repeat themselves",
        published="compressed models use fewer different words",
        rule="more answers are stuck in a loop than dense's at 70 and 80 %, intervals apart",
        measured=tuple(lines),
        verdict=decided(more),
    )


def decided(answers: Sequence[bool]) -> str:
    """The verdict: holds if all answers are true, in part if some are, cannot be told without any."""
    if not answers:
        return OPEN_QUESTION
    return HOLDS if all(answers) else PARTLY if any(answers) else NOT


def points(pair: stats.Paired) -> str:
    """A difference in percentage points with its 95 % interval, as text."""
    return f"{100 * pair.delta:+.1f} points ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})"


def reaches(kept: float, fails: float | None) -> str:
    """The result of `Cells.reach` as text."""
    until = f"matches to {kept:.0%}" if kept else "matches at no level"
    return f"{until}, {'never fails' if fails is None else f'fails from {fails:.0%}'}"


def markdown(found: Sequence[Finding]) -> str:
    """The findings as a Markdown table, followed by the measurements behind each."""
    rows = [f"| {i}. {f.title} | {f.published} | **{f.verdict}** |" for i, f in enumerate(found, start=1)]
    rows.append(
        "| not asked | a small dense model against a large pruned one; few-shot prompts; a judge's scores | "
        "one model of one size, prompts without examples, no judge |"
    )
    parts = ["| finding | LLM-KICK | here |\n|---|---|---|\n" + "\n".join(rows)]
    for i, f in enumerate(found, start=1):
        lines = "\n".join(f"- {line}" for line in f.measured)
        parts.append(f"### {i}. {f.title}: {f.verdict}\n\nLLM-KICK: {f.published}. Rule: {f.rule}.\n\n{lines}")
    return "\n\n".join(parts) + "\n"


def _recipe(entry: Entry) -> Recipe | None:
    try:
        return from_dict(parse(entry.results.model.recipe or "", "recipe"))
    except RecipeError:
        return None


def main() -> None:
    """Print the findings for the first board of the given results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="folders of a sweep")
    try:
        board = together(collect(parser.parse_args().results).boards[0])
        print(markdown(findings(board)), end="")
    except CompressError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
