"""Measures the noise floor: the share of answers that flip when only the batch size changes.

Not here: intervals and verdicts (`stats.py`), which are about sampling other questions. A different batch size changes
the order of floating-point sums and so flips answers that were nearly tied: on a GPU in half precision, some percent
of them. A loss no larger than that cannot be distinguished from no loss.
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
    """The questions to ask a second time: at most `n` of every task, always the same ones."""
    return [sample(asked, exam, n) for asked in exam.tasks]


def measure_noise(
    subject: Subject, results: Results, exam: Exam, again: Sequence[Questions], cache: Cache | None, meter: Meter
) -> dict[str, Noise]:
    """The flips of a model against itself at half the batch size, by task; `again` is a subset of what it was asked.

    Empty at batch size 1, which cannot be halved; asking again at the same size would show no noise. Tasks whose scores
    are not right or wrong are left out: nearly all of theirs change a little.
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
        pairs = [(before[row.id].scores[headline], row.scores[headline]) for row in rows]
        if all(score in (0, 1) for pair in pairs for score in pair):
            found[name] = Noise(batch_size=half, n=len(rows), flips=sum(a != b for a, b in pairs))
    return found


def within(pair: Paired, noise: Noise | None) -> bool:
    """Whether a comparison is within the noise: no larger share of flips than the dense model has by itself.

    Its interval must also include zero, because noise has no direction: the same number of flips is a real difference
    if significantly more of them are losses than gains, or the reverse.
    """
    alike = pair.low <= 0 <= pair.high
    return alike and noise is not None and noise.n > 0 and pair.flips <= noise.flips / noise.n


def sentence(noise: Mapping[str, Noise], pairs: Mapping[str, tuple[str, Paired]]) -> str:
    """A sentence that names the tasks in which a compressed model is within the noise; empty without a measurement.

    `pairs` holds (title, comparison) by task name.
    """
    titles = [title for name, (title, pair) in pairs.items() if within(pair, noise.get(name))]
    flips, asked = (sum(getattr(found, part) for found in noise.values()) for part in ("flips", "n"))
    if not noise:
        return ""
    known = f"the dense model's own noise ({flips} of {asked:,} answers change with the batch size)"
    if not titles:
        return f"Every task that can flip differs by more than {known}."
    return f"Indistinguishable from {known}: {'; '.join(titles)}."
