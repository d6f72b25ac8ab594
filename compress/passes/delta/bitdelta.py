"""BitDelta: the signs of a matrix with few scales; one bit a weight, or one more for each level.

Shape suffixes: O out, I in, L levels, S matrices that have scales of their own (one, or one for each row).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.model.site import Site
from compress.passes.base import Quantizer
from compress.passes.unbiased import unbiased
from compress.stats import Gram, Statistic
from compress.weights import Masked, Signs, Sum, Weight


@dataclass(frozen=True, kw_only=True)
class BitDelta(Quantizer, name="bitdelta"):
    """W' = the sum over levels of scale * sign(residual of W after the levels before); the sign of 0 is +.

    With one level and one scale, `fit: mean` gives mean |W|, which is nearest to W. The scales of all levels are solved
    for together, by the weights or, with `output`, by tr((W' - W) G (W' - W)ᵀ); they are stored in bfloat16. To learn
    them from the output of a block instead, let `finetune` follow.
    Source: Liu et al., "BitDelta", NeurIPS 2024, section 3. The paper has one scale per matrix, one level, and distils
    all scales by the logits; its released code distils embeddings and norms too.
    """

    unfed: ClassVar[str] = "scaled by its weights alone"
    gives: ClassVar[str] = "signed"

    scale: Annotated[Literal["matrix", "row"], Field(description="whether the matrix or each row has one scale")] = (
        "row"
    )
    levels: Annotated[
        int, Field(ge=1, le=4, description="bits per weight; each level codes what the levels before it left")
    ] = 1
    fit: Annotated[
        Literal["mean", "output"], Field(description="what the scales are fitted to: the weights (mean) or the output")
    ] = "output"

    unbiased: Annotated[
        bool,
        Field(
            description="rescale what is stored so that its error is orthogonal to the weight (no shrinkage towards 0)"
        ),
    ] = False

    @property
    def requires(self) -> tuple[type[Statistic], ...]:  # type: ignore[override]
        """The Gram, if scales are fitted to the output."""
        return (Gram,) if self.fit == "output" else ()

    def round(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """Signs with scales fitted to the weights alone."""
        del site
        return self.signs(w_OI.float(), keep_OI, None)

    def quantize(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """Signs with scales fitted as `fit` says."""
        return self.signs(w_OI.float(), keep_OI, site.stats[Gram] if self.fit == "output" else None)

    def signs(self, w_OI: Tensor, keep_OI: Tensor | None, gram_II: Tensor | None) -> Weight:
        """One `Signs` per level, with the scales that fit the matrix best."""
        positive = self.levelled(w_OI, keep_OI)
        signed = [signs_of(level_OI, keep_OI) for level_OI in positive]
        scale_SL = best_scales(w_OI, signed, gram_II, self.scale == "matrix").bfloat16()
        terms = tuple(Signs(p, s[:, None].contiguous()) for p, s in zip(positive, scale_SL.unbind(1), strict=True))
        weight: Weight = terms[0] if len(terms) == 1 else Sum(terms)
        if not self.unbiased or w_OI.is_meta:
            return weight
        held = weight if keep_OI is None else Masked(weight, keep_OI, "kept")
        larger = unbiased(held, w_OI, gram_II)
        return larger.values if isinstance(larger, Masked) else larger

    def levelled(self, w_OI: Tensor, keep_OI: Tensor | None) -> list[Tensor]:
        """Where each level is positive: the signs of the residual of W after the levels before, at their means."""
        left_OI, found = w_OI, []
        for _ in range(self.levels):
            found.append(left_OI >= 0)
            signed_OI = signs_of(found[-1], keep_OI)
            scale_S1 = best_scales(left_OI, [signed_OI], None, self.scale == "matrix")
            left_OI = left_OI - scale_S1 * signed_OI
        return found


def signs_of(positive: Tensor, keep_OI: Tensor | None) -> Tensor:
    """+1 and -1, and 0 where a mask cuts, float32."""
    signed_OI = torch.where(positive, 1.0, -1.0)
    return signed_OI if keep_OI is None else signed_OI.masked_fill(~keep_OI, 0)


def best_scales(w_OI: Tensor, signed: list[Tensor], gram_II: Tensor | None, whole: bool) -> Tensor:
    """The scales [S, L] with which the sum of these sign matrices is nearest to W; float32, computed in float64.

    Nearest by its output if a Gram is given that is not 0, else by its entries. Scales that the error does not depend
    on are 0. For one matrix of signs s the scale is tr(W G sᵀ) / tr(s G sᵀ).
    """
    seen = [s_OI if gram_II is None or not bool(gram_II.any()) else s_OI @ gram_II for s_OI in signed]
    right_OL = torch.stack([(w_OI * seen_OI).sum(1) for seen_OI in seen], -1).double()
    rows = [torch.stack([(s_OI * seen_OI).sum(1) for s_OI in signed], -1) for seen_OI in seen]
    left_OLL = torch.stack(rows, -1).double()
    if whole:
        right_OL, left_OLL = right_OL.sum(0, keepdim=True), left_OLL.sum(0, keepdim=True)
    inverse_SLL = torch.linalg.pinv(left_OLL, rtol=1e-6, hermitian=True)
    scale_SL: Tensor = (inverse_SLL @ right_OL[..., None])[..., 0].float()
    return scale_SL
