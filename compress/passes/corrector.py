"""Low-rank corrections: the best two thin matrices to add to a weight, and how they are stored.

Shape suffixes: O out, I in, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError
from compress.model.site import Site
from compress.passes.base import WeightPass
from compress.passes.whitened import most_rank, principal
from compress.stats import ColumnNorm, Gram, Statistic
from compress.weights import Dense, Grid, Product

Precision = Literal["half", "int8", "int4"]
TINY = 1e-30


def stored(left_OR: Tensor, right_RI: Tensor, precision: Precision) -> Product:
    """The two factors as they are stored: float16, or symmetric integers rounded to nearest.

    The columns of `left_OR` are orthonormal, so one scale serves all of it; each row of `right_RI` has its own scale.
    """
    if precision == "half":
        return Product(Dense(left_OR.half()), Dense(right_RI.half()))
    bits = int(precision.removeprefix("int"))
    whole, rows = (Grid(bits=bits, group=group, symmetric=True) for group in (-1, 0))
    search = bits < 8  # at 8 bits a shorter range gains nothing
    return Product(whole.quantize(left_OR, search=search), rows.quantize(right_RI, search=search))


def stored_outline(shape: tuple[int, int], rank: int, precision: Precision) -> Product:
    """The two factors for a matrix [out, in], without values."""
    left_OR, right_RI = (torch.empty(size, device="meta") for size in ((shape[0], rank), (rank, shape[1])))
    return stored(left_OR, right_RI, precision)


@dataclass(frozen=True, kw_only=True)
class Corrector(WeightPass):
    """A pass that adds the low-rank matrix which best corrects an error, in a metric of the site's input.

    Let U be the first r principal directions of the error's output. Of all matrices of rank r, U Uᵀ E is then the
    nearest to E in the metric. No root of the metric is ever inverted, so inputs that never fire need no special
    treatment.
    """

    rank: Annotated[int | None, Field(ge=1, description="rank of the correction; null: set by share")] = None
    share: Annotated[float, Field(gt=0, lt=1, description="rank as a share of the matrix's shorter side")] = 0.1
    metric: Annotated[
        Literal["gram", "diagonal", "plain"],
        Field(
            description="what to minimise: the error of the output, the same for independent inputs, or the error of "
            "the weights"
        ),
    ] = "gram"
    precision: Annotated[Precision, Field(description="how the two factors are stored")] = "half"

    @property
    def requires(self) -> tuple[type[Statistic], ...]:  # type: ignore[override]
        """The statistic that the metric needs."""
        return {"gram": (Gram,), "diagonal": (ColumnNorm,), "plain": ()}[self.metric]

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError if the rank is 0, or if its factors hold no fewer numbers than the matrix."""
        rank, most, (rows, columns) = self.rank_of(shape), most_rank(shape), shape
        if rank < 1:
            raise RecipeError(
                f"{self.name}: {site}: a share of {self.share:g} of {rows}x{columns} gives rank 0; raise share"
            )
        if rank > most:
            raise RecipeError(
                f"{self.name}: {site}: factors of rank {rank} are no smaller than the {rows}x{columns} matrix itself; "
                f"at most rank {most} is"
            )

    def rank_of(self, shape: tuple[int, int]) -> int:
        """The rank of the correction for a matrix of this shape."""
        return int(self.share * min(shape) + 1e-9) if self.rank is None else self.rank

    def weighing(self, site: Site) -> Tensor | None:
        """The metric: [in, in], [in], or None if all inputs count equally."""
        match self.metric:
            case "gram":
                return site.stats[Gram]
            case "diagonal":
                return site.stats[ColumnNorm].square()
            case _:
                return None

    def correction(self, error_OI: Tensor, metric: Tensor | None) -> tuple[Product, float]:
        """The factors, and the share of the error's energy in the metric that no factors of this rank could correct."""
        energy_R, basis_OR = principal(error_OI, metric)
        left_OR = basis_OR[:, : self.rank_of((error_OI.shape[0], error_OI.shape[1]))].contiguous()
        left_over = energy_R[left_OR.shape[1] :].sum() / energy_R.sum().clamp(min=TINY)
        return stored(left_OR, left_OR.T @ error_OI, self.precision), float(left_over)


def worth(factors: Product, left_over: float) -> dict[str, float]:
    """What factors save and cost, in bits a weight, if they leave the share `left_over` of an error's energy.

    One more bit for every weight of a grid leaves a quarter of the error's energy, so the factors save log4(1 / share)
    bits.
    """
    rows, columns = factors.shape
    return {
        "rank": factors.left.shape[1],
        "left": left_over,
        "saves_bits": -log(max(left_over, TINY), 4),
        "costs_bits": 8 * factors.nbytes() / (rows * columns),
    }
