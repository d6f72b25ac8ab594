"""The cost of passes that examine the whole dense model before anything is rewritten: budgets and reshaping passes.

Shape suffixes: O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compress.passes.quantization import smoothquant
from compress.planning.costs.work import CODING, F32, Work, energy
from compress.stats import Gram, Sample, Statistic

COUNTING = 120  # passes to count scores in bins
SCORING = 30  # passes to compute scores twice: for their mean, and to count those far above it
PAIRS = 4  # of writers and readers in a block with a gated MLP, whose scales AWQ searches one after the other
SCALED, TURNED = 6, 12  # passes to scale or rotate a tensor, which is done each time it is read
Matrix = Callable[[int, int], Work]
Governs = Callable[[int, int], Work]


def nothing(rows: int, columns: int) -> Work:
    """No work on a matrix."""
    del rows, columns
    return Work()


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """The cost of a pass on the dense model before the walk.

    `forwards` is the number of forward passes over all calibration tokens, `kinds` are the statistics that are
    collected for all inputs of a block at once, and `work` is the work on each matrix that the pass, or the one it
    governs, selects. `kept` is the number of copies of the probe's hidden states that each distinct input, or with
    `each` every matrix, adds, and that run on to the logits. `reshapes` says whether the pass makes a new model, and
    `made` is the work of computing one of its tensors, which is done each time the tensor is read.
    """

    forwards: int
    kinds: tuple[type[Statistic], ...] = ()
    work: Matrix = nothing
    kept: int = 0
    each: bool = False
    made: Matrix = nothing
    reshapes: bool = False


def tried(step: Any, governed: Any, own: Governs) -> Ahead:
    """Sensitivity: the governed pass with every option; by KL, the probe also runs to the logits for each."""
    by_gram = step.measure == "gram"
    kinds = tuple(dict.fromkeys((*governed.requires, *((Gram,) if by_gram else ()))))
    count = len(step.options_for(governed))
    return Ahead(
        forwards=1 + bool(kinds), kinds=kinds, kept=0 if by_gram else count,
        work=lambda rows, columns: own(rows, columns).times(count) + energy(rows, columns, 2 * count * by_gram),
    )  # fmt: skip


def spectra(step: Any, governed: Any, own: Governs) -> Ahead:
    """Ranks and WeLore: the spectrum of each matrix; by KL each is also cut, and the probe runs to the logits."""
    cuts = getattr(step, "measure", "") == "kl" and bool(governed.removed)
    kinds = tuple(governed.requires)
    return Ahead(
        forwards=1 + bool(kinds), kinds=kinds, kept=int(cuts), each=not governed.shared,
        work=lambda rows, columns: own(rows, columns).times(1 + cuts),
    )  # fmt: skip


def outliers(step: Any, governed: Any, own: Governs) -> Ahead:
    """OWL: the scores far above their mean."""
    del governed, own
    work = lambda rows, columns: Work(nbytes=3 * F32 * rows * columns, passes=SCORING)  # noqa: E731
    return Ahead(forwards=2, kinds=tuple(step.requires), work=work)


def counted(step: Any, governed: Any, own: Governs) -> Ahead:
    """Global: the scores of all matrices, counted in bins."""
    del step, own
    kinds = tuple(governed.requires)
    work = lambda rows, columns: Work(nbytes=6 * F32 * rows * columns, passes=COUNTING)  # noqa: E731
    return Ahead(forwards=1 + bool(kinds), kinds=kinds, work=work)


def equalized(step: Any, governed: Any, own: Governs) -> Ahead:
    """AWQ: for each power the matrix is rounded to nearest; measured by the Gram, or `exact` by the block."""
    del governed, own

    def work(rows: int, columns: int) -> Work:
        return (Work(passes=CODING + 20) + energy(rows, columns)).beside(2 * F32 * rows * columns).times(step.steps)

    tried = PAIRS * (step.steps + 1) if step.exact else 0
    return Ahead(forwards=2 + tried, kinds=tuple(step.requires), work=work, made=scaled, reshapes=True)


def smoothed(step: Any, governed: Any, own: Governs) -> Ahead:
    """SmoothQuant: for each strength the output error is measured on a sample of tokens; none with a fixed `alpha`."""
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
    """SliceGPT and QuaRot: a product with the rotation of the hidden state each time a tensor is read."""
    del governed, own

    def made(rows: int, columns: int) -> Work:
        return Work(nbytes=3 * F32 * rows * columns, flops=2.0 * rows * columns * min(rows, columns), passes=TURNED)

    return Ahead(forwards=2 if step.name == "slicegpt" else 0, made=made, reshapes=True)


def left_out(step: Any, governed: Any, own: Governs) -> Ahead:
    """ShortGPT: how much each block changes the hidden state."""
    del step, governed, own
    return Ahead(forwards=2, reshapes=True)


def glanced(rows: int, columns: int) -> Work:
    """One look at each entry."""
    return Work(nbytes=F32 * rows * columns, passes=4)


def scaled(rows: int, columns: int) -> Work:
    """The work of multiplying a tensor by scales in float32."""
    return Work(nbytes=3 * F32 * rows * columns, passes=SCALED)


AHEAD: dict[str, Callable[[Any, Any, Governs], Ahead]] = {
    "sensitivity": tried, "ranks": spectra, "welore": spectra, "owl": outliers, "global": counted, "awq": equalized,
    "smoothquant": smoothed, "flap": silenced, "wanda-sp": silenced, "slicegpt": turned, "quarot": turned,
    "shortgpt": left_out,
}  # fmt: skip
