"""What passes cost that look at the whole dense model before anything is rewritten: budgets, and what reshapes it.

Shape suffixes: O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compress.passes.quantization import smoothquant
from compress.planning.costs.work import CODING, F32, Work, energy
from compress.stats import Gram, Sample, Statistic

COUNTING = 120  # passes of the bins of scores
SCORING = 30  # passes of scores, twice: their mean, and how many lie above
SCALED, TURNED = 6, 12  # passes of a tensor that is scaled or turned whenever it is read
Matrix = Callable[[int, int], Work]
Governs = Callable[[int, int], Work]


def nothing(rows: int, columns: int) -> Work:
    """No work on a matrix."""
    del rows, columns
    return Work()


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """What a pass does with the dense model: `forwards` of all calibration tokens through it, `kinds` measured of all
    inputs of a block at once, `work` on each matrix that it, or the pass it governs, selects.

    `kept` are the hidden states of the probe that each input, or `each` matrix, leaves and that go on to the logits.
    `made` is the work of making a tensor of the new model whenever it is read; `reshapes` whether there is one.
    """

    forwards: int
    kinds: tuple[type[Statistic], ...] = ()
    work: Matrix = nothing
    kept: int = 0
    each: bool = False
    made: Matrix = nothing
    reshapes: bool = False


def tried(step: Any, governed: Any, own: Governs) -> Ahead:
    """Sensitivity: the pass it governs at every option, and the probe sent on from each part."""
    by_gram = step.measure == "gram"
    kinds = tuple(dict.fromkeys((*governed.requires, *((Gram,) if by_gram else ()))))
    count = len(step.options_for(governed))
    return Ahead(
        forwards=1 + bool(kinds), kinds=kinds, kept=0 if by_gram else count,
        work=lambda rows, columns: own(rows, columns).times(count) + energy(rows, columns, 2 * count * by_gram),
    )  # fmt: skip


def spectra(step: Any, governed: Any, own: Governs) -> Ahead:
    """Ranks and WeLore: what the pass would cut of each matrix; by KL each is cut, and the probe sent on from it."""
    cuts = getattr(step, "measure", "") == "kl" and bool(governed.removed)
    kinds = tuple(governed.requires)
    return Ahead(
        forwards=1 + bool(kinds), kinds=kinds, kept=int(cuts), each=not governed.shared,
        work=lambda rows, columns: own(rows, columns).times(1 + cuts),
    )  # fmt: skip


def outliers(step: Any, governed: Any, own: Governs) -> Ahead:
    """OWL: scores far above their mean."""
    del governed, own
    work = lambda rows, columns: Work(nbytes=3 * F32 * rows * columns, passes=SCORING)  # noqa: E731
    return Ahead(forwards=2, kinds=tuple(step.requires), work=work)


def counted(step: Any, governed: Any, own: Governs) -> Ahead:
    """Global: the scores of all matrices in bins."""
    del step, own
    kinds = tuple(governed.requires)
    work = lambda rows, columns: Work(nbytes=6 * F32 * rows * columns, passes=COUNTING)  # noqa: E731
    return Ahead(forwards=1 + bool(kinds), kinds=kinds, work=work)


def equalized(step: Any, governed: Any, own: Governs) -> Ahead:
    """AWQ: each power is rounded to nearest and measured by the Gram."""
    del governed, own

    def work(rows: int, columns: int) -> Work:
        return (Work(passes=CODING + 20) + energy(rows, columns)).beside(2 * F32 * rows * columns).times(step.steps)

    return Ahead(forwards=2, kinds=tuple(step.requires), work=work, made=scaled, reshapes=True)


def smoothed(step: Any, governed: Any, own: Governs) -> Ahead:
    """SmoothQuant: each strength is measured by outputs on a sample of tokens."""
    del governed, own
    tries = 0 if step.alpha is not None else 1 + len(smoothquant.STRENGTHS)

    def work(rows: int, columns: int) -> Work:
        flops = 2 * 2.0 * rows * columns * Sample.FEW
        sample = F32 * Sample.FEW * (3 * columns + 3 * rows)
        return Work(nbytes=3 * F32 * rows * columns + sample, passes=CODING + 20, flops=flops).times(tries)

    return Ahead(forwards=2, kinds=tuple(step.requires), work=work, made=scaled, reshapes=True)


def silenced(step: Any, governed: Any, own: Governs) -> Ahead:
    """FLAP and Wanda-sp: one input is measured for heads and one for neurons, then the block runs without them."""
    del governed, own
    return Ahead(forwards=1 + bool(step.heads) + bool(step.neurons), work=glanced, reshapes=True)


def turned(step: Any, governed: Any, own: Governs) -> Ahead:
    """SliceGPT and QuaRot: products with the axes of the hidden state whenever a tensor is read."""
    del governed, own

    def made(rows: int, columns: int) -> Work:
        return Work(nbytes=3 * F32 * rows * columns, flops=2.0 * rows * columns * min(rows, columns), passes=TURNED)

    return Ahead(forwards=2 if step.name == "slicegpt" else 0, made=made, reshapes=True)


def left_out(step: Any, governed: Any, own: Governs) -> Ahead:
    """ShortGPT: what blocks change."""
    del step, governed, own
    return Ahead(forwards=2, reshapes=True)


def glanced(rows: int, columns: int) -> Work:
    """A look at each entry."""
    return Work(nbytes=F32 * rows * columns, passes=4)


def scaled(rows: int, columns: int) -> Work:
    """A tensor multiplied by scales in float32."""
    return Work(nbytes=3 * F32 * rows * columns, passes=SCALED)


AHEAD: dict[str, Callable[[Any, Any, Governs], Ahead]] = {
    "sensitivity": tried, "ranks": spectra, "welore": spectra, "owl": outliers, "global": counted, "awq": equalized,
    "smoothquant": smoothed, "flap": silenced, "wanda-sp": silenced, "slicegpt": turned, "quarot": turned,
    "shortgpt": left_out,
}  # fmt: skip
