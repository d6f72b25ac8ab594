"""DSnoT: swap pruned weights for kept ones until the expected output of each row is that of the dense row.

The core, `dsnot`, works on plain matrices, all rows at once. Shape suffixes: O out, I in, M inputs of a group, K
cycles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.model.site import Site, energy
from compress.passes.base import Refiner
from compress.stats import ColumnNorm, Gram, Moments, Statistic
from compress.weights import Weight
from compress_kernels import solver

Form = Literal["guarded", "reference", "paper"]
ATTENTION = ("attn", "attention")


@dataclass(frozen=True, kw_only=True)
class DSnoT(Refiner, name="dsnot"):
    """Restore the cut weight that best reduces a row's expected error, cut the kept one of lowest score, and repeat.

    Weights keep their original values. `guarded` accepts a swap only if it reduces the error. `reference` swaps as the
    released code does and so overshoots: it accepts every swap where rows compete, and under n:m only swaps after which
    the error keeps its sign. `paper` considers all weights anew in every cycle and accepts every swap. The criterion is
    the mean error, which says little about the squared error; with `measure` both are recorded, before and after.
    Source: Zhang et al., "Dynamic Sparse No Training", ICLR 2024, equations 3-6 and algorithm 1. Deviations: weights of
    channels without variance are not restored (the released code divides by zero and restores them first); a row stops
    when its queue is exhausted; under n:m a weight is not cut twice.
    """

    form: Annotated[Form, Field(description="guarded, reference or paper")] = "guarded"
    cycles: Annotated[int, Field(ge=0, le=10000, description="swaps per row, at most")] = 50
    threshold: Annotated[
        float,
        Field(
            ge=0,
            le=1e9,
            description="error of a row, on mean inputs, below which it is left alone; the paper's 0.1 / 2048",
        ),
    ] = 4.9e-5
    power: Annotated[
        float,
        Field(ge=0, le=16, description="exponent of the input variance that divides the score of a restored weight"),
    ] = 1.0
    variance: Annotated[
        Literal["within", "total"],
        Field(description="variance of an input within calibration windows, or over all tokens"),
    ] = "within"
    targets: Annotated[
        Literal["all", "attention", "mlp"],
        Field(description="the matrices to refine; the released code refines only attention"),
    ] = "all"
    measure: Annotated[bool, Field(description="also record squared errors, which needs a Gram")] = True

    @property
    def requires(self) -> tuple[type[Statistic], ...]:  # type: ignore[override]
        """Norms and moments of the input; with `measure` also its Gram."""
        return (ColumnNorm, Moments, Gram) if self.measure else (ColumnNorm, Moments)

    def rewrite(self, site: Site) -> Weight:
        """The original values under the refined mask."""
        _, weight = self.masked(site)
        m = self.group(site, weight)
        attention = any(part in site.name.lower() for part in ATTENTION)
        if self.targets != "all" and (self.targets == "attention") != attention:
            return weight
        w_OI = site.target.data.float()
        mean_I, total_I, within_I = site.stats[Moments]
        keep_OI = dsnot(
            w_OI, weight.mask_OI, mean_I, within_I if self.variance == "within" else total_I, site.stats[ColumnNorm],
            m=m, form=self.form, cycles=self.cycles, threshold=self.threshold, power=self.power,
        )  # fmt: skip
        errors = [(w_OI * ~mask @ mean_I).abs().mean() for mask in (weight.mask_OI, keep_OI)]
        site.ledger["mean_error"] = [float(error) for error in errors]
        if self.measure:
            gram_II = site.stats[Gram]
            site.ledger["squared_error"] = [
                float(energy(w_OI * ~mask, gram_II) / energy(w_OI, gram_II).clamp(min=1e-30))
                for mask in (weight.mask_OI, keep_OI)
            ]
        return self.remasked(site, w_OI, keep_OI, weight.pattern)


def dsnot(
    w_OI: Tensor, keep_OI: Tensor, mean_I: Tensor, variance_I: Tensor, norm_I: Tensor, *, m: int = 0,
    form: Form = "guarded", cycles: int = 50, threshold: float = 4.9e-5, power: float = 1.0,
) -> Tensor:  # fmt: skip
    """The refined mask, True = kept, with as many kept in each row, and in each group of `m` inputs if m is not 0.

    `mean_I` and `variance_I` are the means and variances of the inputs, `norm_I` their L2 norms; `threshold` is in
    units of weight times mean. The error of a row is the sum of weight times mean over its cut weights, which is the
    expected difference between the dense output and the pruned one.
    """
    state = Rows(w_OI, keep_OI, mean_I, variance_I, norm_I, m, power, anew=form == "paper", depth=cycles)
    if solver.usable(w_OI) and form != "paper":
        return state.exchanged(guarded=form == "guarded", cycles=cycles, threshold=threshold)
    first_O = state.error_O.sign()
    active_O = torch.ones_like(first_O, dtype=torch.bool)
    for _ in range(cycles):
        active_O &= state.error_O.abs() > threshold
        if not bool(active_O.any()):
            break
        grow_O, drop_O, valid_O = state.candidates()
        active_O &= valid_O
        after_O = state.error_O + state.gathered(drop_O) - state.gathered(grow_O)
        if form == "guarded":
            active_O &= after_O.abs() < state.error_O.abs()
        elif form == "reference" and m:
            active_O &= after_O.sign() == first_O
        state.swap(grow_O, drop_O, after_O, active_O)
    return state.keep_OI


class Rows:
    """The masks of all rows during refinement, and the next weight to restore and to cut in each row.

    Scores are static: queues of the best candidates are built once for either sign of the error, and an entry that was
    swapped is never considered again. With `anew`, the best is searched among all entries in every cycle. Under n:m the
    weight to cut is the kept one of lowest score in the group that restores one, whatever its sign.
    """

    def __init__(
        self, w_OI: Tensor, keep_OI: Tensor, mean_I: Tensor, variance_I: Tensor, norm_I: Tensor, m: int, power: float,
        *, anew: bool, depth: int,
    ) -> None:  # fmt: skip
        self.keep_OI, self.m, self.anew = keep_OI.clone(), m, anew
        self.part_OI = w_OI * mean_I  # expected contribution of each weight to the output
        self.quiet_OI = w_OI.abs() * norm_I
        self.merit_OI = torch.where(
            (variance_I > 0) | (power == 0), self.part_OI / variance_I.clamp(min=1e-30) ** power, 0
        )
        self.error_O = (self.part_OI * ~keep_OI).sum(1)
        self.used_OI = torch.zeros_like(keep_OI)
        self.depth = max(1, min(depth, w_OI.shape[1]))
        self.at = torch.zeros(2, 2, len(w_OI), dtype=torch.long, device=w_OI.device)  # [grow or drop, sign, out]
        if not anew:
            signs = (1.0, -1.0)
            self.grow = [self.merit_of(s).topk(self.depth, 1) for s in signs]
            self.drop = [self.quiet_of(s).topk(self.depth, 1, largest=False) for s in signs] if not m else []

    def exchanged(self, *, guarded: bool, cycles: int, threshold: float) -> Tensor:
        """The mask after all cycles, computed in one kernel launch; only for queues."""
        return solver.exchange(
            self.part_OI, self.keep_OI, self.error_O, queue(self.grow), self.quiet_OI if self.m else queue(self.drop),
            m=self.m, guarded=guarded, cycles=cycles, threshold=threshold,
        )  # fmt: skip

    def merit_of(self, sign: float | Tensor) -> Tensor:
        """The merit of restoring each cut weight while the error has this sign; -inf where it may not be restored."""
        merit_OI = self.merit_OI * sign
        return merit_OI.masked_fill(self.keep_OI | (merit_OI <= 0), -torch.inf)

    def quiet_of(self, sign: float | Tensor) -> Tensor:
        """The score |w| * norm of each kept weight whose removal moves the error towards zero; inf for all others."""
        return self.quiet_OI.masked_fill(~self.keep_OI | (self.part_OI * sign >= 0), torch.inf)

    def candidates(self) -> tuple[Tensor, Tensor, Tensor]:
        """(weight to restore, weight to cut, whether both exist), each [out]."""
        sign_O = self.error_O.sign()
        if self.anew:
            value_O, grow_O = self.merit_of(sign_O[:, None]).max(1)
        else:
            value_O, grow_O = self.head(self.grow, self.at[0], sign_O)
        if self.m:
            level_O, drop_O = self.quietest_beside(grow_O)
        elif self.anew:
            level_O, drop_O = self.quiet_of(sign_O[:, None]).min(1)
        else:
            level_O, drop_O = self.head(self.drop, self.at[1], sign_O)
        return grow_O, drop_O, value_O.isfinite() & level_O.isfinite()

    def head(self, queues: Sequence[tuple[Tensor, Tensor]], at: Tensor, sign_O: Tensor) -> tuple[Tensor, Tensor]:
        """Value and index at the head of the queue for each row's sign; not finite where the queue has run out."""
        heads = []
        for (value_OK, index_OK), place_O in zip(queues, at, strict=True):
            inside_O1 = place_O.clamp(max=self.depth - 1)[:, None]
            value_O = value_OK.gather(1, inside_O1)[:, 0].masked_fill(place_O >= self.depth, torch.nan)
            heads.append((value_O, index_OK.gather(1, inside_O1)[:, 0]))
        plus_O = sign_O > 0
        return torch.where(plus_O, heads[0][0], heads[1][0]), torch.where(plus_O, heads[0][1], heads[1][1])

    def quietest_beside(self, grow_O: Tensor) -> tuple[Tensor, Tensor]:
        """Score and index of the lowest kept weight, not swapped before, in the group of each weight to restore."""
        beside_OM = grow_O[:, None] // self.m * self.m + torch.arange(self.m, device=grow_O.device)
        closed_OM = ~self.keep_OI.gather(1, beside_OM) | self.used_OI.gather(1, beside_OM)
        level_O, place_O = self.quiet_OI.gather(1, beside_OM).masked_fill(closed_OM, torch.inf).min(1)
        return level_O, beside_OM.gather(1, place_O[:, None])[:, 0]

    def gathered(self, index_O: Tensor) -> Tensor:
        """The expected contribution of one weight of each row."""
        return self.part_OI.gather(1, index_O[:, None])[:, 0]

    def swap(self, grow_O: Tensor, drop_O: Tensor, after_O: Tensor, active_O: Tensor) -> None:
        """Swap one pair in each active row, and advance the queues that it used."""
        rows = active_O.nonzero()[:, 0]
        side = (self.error_O[rows] < 0).long()
        self.at[0, side, rows] += 1
        self.at[1, side, rows] += 1
        self.keep_OI[rows, grow_O[rows]] = True
        self.keep_OI[rows, drop_O[rows]] = False
        if self.m:
            self.used_OI[rows, grow_O[rows]] = True
            self.used_OI[rows, drop_O[rows]] = True
        self.error_O = torch.where(active_O, after_O, self.error_O)


def queue(signs: Sequence[tuple[Tensor, Tensor]]) -> solver.Queue:
    """The queues of either sign in the layout that the kernel takes."""
    values, indices = zip(*signs, strict=True)
    return solver.Queue(value=torch.stack(values), index=torch.stack(indices).int())
