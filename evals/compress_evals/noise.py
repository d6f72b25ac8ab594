"""What answers change when nothing does but the batch size: a loss no larger than that is none.

Not here: intervals and verdicts (`stats.py`), which are about questions that were not asked. Sums in another order
flip answers that were nearly tied, on a GPU in half precision some percent of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compress_evals.answers import answers
from compress_evals.cache import Cache
from compress_evals.progress import Meter
from compress_evals.questions import Exam, Questions, sample
from compress_evals.results import Noise, Results
from compress_evals.stats import Paired
from compress_evals.subject import Subject


def samples(exam: Exam, n: int) -> list[Questions]:
    """What is asked once more: at most `n` questions of every task, always the same."""
    return [sample(asked, exam, n) for asked in exam.tasks]


def measure_noise(
    subject: Subject, results: Results, exam: Exam, again: Sequence[Questions], cache: Cache | None, meter: Meter
) -> dict[str, Noise]:
    """The flips of a model against itself at half the batch size, by task; `again` are some of what it was asked.

    Nothing where questions are asked one at a time: there is no half of one, and the same again shows no noise.
    """
    half, found = results.engine.batch_size // 2, dict[str, Noise]()
    if not half:
        return found
    for number, asked in enumerate(again, start=1):
        heard = meter.begin(f"{subject.name}, noise", asked, number, len(again))
        rows = answers(subject, asked, exam, half, cache, heard).rows
        meter.finish(asked)
        name = asked.task.name
        before, headline = {row.id: row for row in results.rows[name]}, results.tasks[name].headline
        flips = sum(before[row.id].scores[headline] != row.scores[headline] for row in rows)
        found[name] = Noise(batch_size=half, n=len(rows), flips=flips)
    return found


def within(pair: Paired, noise: Noise | None) -> bool:
    """Whether a comparison flips no larger a share of answers than the dense model does by itself, both ways alike.

    Noise has no direction: as many flips that are surely more losses than gains, or the reverse, are a difference.
    """
    alike = pair.low <= 0 <= pair.high
    return alike and noise is not None and noise.n > 0 and pair.flips <= noise.flips / noise.n


def sentence(noise: Mapping[str, Noise], pairs: Mapping[str, tuple[str, Paired]]) -> str:
    """Which tasks, of (title, comparison) by name, a compressed model does not differ in by more than noise."""
    titles = [title for name, (title, pair) in pairs.items() if within(pair, noise.get(name))]
    flips, asked = (sum(getattr(found, part) for found in noise.values()) for part in ("flips", "n"))
    if not noise:
        return ""
    known = f"the dense model's own noise ({flips} of {asked:,} answers change with the batch size)"
    if not titles:
        return f"Every task differs by more than {known}."
    return f"Indistinguishable from {known}: {'; '.join(titles)}."
