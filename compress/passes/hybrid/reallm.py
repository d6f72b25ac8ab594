"""ReALLM: a few directions stored separately in high precision, the rest in vector codes.

What a reader would question: the first factors come from the plain singular value decomposition, not from one weighted
by the input. After error feedback, the squared size of the coded remainder counts, not its share of the output's
energy: over 14 matrices of the built-in model, log4 of the reduction in squared size predicts the bits saved to within
0.04, while log4 of the reduction in output energy (the usual rule) predicts 3 to 18 times too many. Shape suffixes: O
out, I in, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError
from compress.model.site import Site, energy
from compress.passes.corrector import Precision, stored, stored_outline
from compress.passes.quantization.vq import VQ
from compress.passes.whitened import bits_saved, output_basis
from compress.stats import Gram
from compress.weights import Product, Sum, Weight


@dataclass(frozen=True, kw_only=True)
class ReALLM(VQ, name="reallm"):
    """W = Q + L1 L2: low rank first, vector codes for the rest, then each again given the other; the best is kept.

    A matrix for which the factors cost more bits than they save is only coded, unless `always` is set; the ledger
    records what they save and cost. The options of `vq` define the codes.
    Source: Leconte et al., "ReALLM", 2024, arXiv 2405.13155. Deviations: the books of `vq` replace a learned decoder;
    factors are solved in closed form and refitted in whitened space, without fine-tuning.
    """

    rank: Annotated[int, Field(ge=1, le=512, description="rank of L1 L2")] = 16
    precision: Annotated[Precision, Field(description="how L1 and L2 are stored")] = "half"
    rounds: Annotated[
        int, Field(ge=1, le=8, description="rounds of coding what the factors leave and refitting the factors")
    ] = 2
    always: Annotated[bool, Field(description="keep the factors even where they cost more bits than they save")] = False

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError unless the rank is smaller than both sides of the matrix."""
        super().check(site, shape)
        if self.rank >= min(shape):
            raise RecipeError(
                f"{self.name}: {site}: rank {self.rank} is not a low rank for a matrix {shape[0]}x{shape[1]}"
            )

    def quantize(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """Codes and factors, or codes alone."""
        w_OI, gram_II = w_OI.float(), site.stats[Gram]
        code = self.coder(site)
        factors = self.fitted(w_OI, None)
        saved = bits_saved(w_OI, w_OI - factors.dense())
        cost = 8 * factors.nbytes() / w_OI.numel()
        site.ledger["low_rank"] = {"saves_bits": saved, "costs_bits": cost}
        if saved <= cost and not self.always:
            return code(w_OI)
        tried: list[tuple[float, Weight]] = []
        for _ in range(self.rounds):
            coded = code(w_OI - factors.dense())
            refitted = self.fitted(w_OI - coded.dense(), gram_II)
            for each in (factors, refitted):
                result = Sum((coded, each))
                tried.append((float(energy(result.dense() - w_OI, gram_II)), result))
            factors = refitted
        return min(tried, key=lambda pair: pair[0])[1]

    @property
    def foreseen(self) -> bool:
        """True only with `always`, because factors that do not pay are otherwise left out."""
        return self.always

    def outline(self, site: Site) -> Weight | None:
        """Codes and two factors, whatever they would save."""
        coded = super().outline(site)
        return None if coded is None else Sum((coded, stored_outline(site.shape, self.rank, self.precision)))

    def fitted(self, w_OI: Tensor, gram_II: Tensor | None) -> Product:
        """The factors of W as they are stored."""
        left_OR = output_basis(w_OI, gram_II, self.rank)
        return stored(left_OR, left_OR.T @ w_OI, self.precision)
