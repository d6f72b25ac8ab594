"""Equivalent rescaling of channels before quantization: a subclass decides the scale of each channel.

The scales are folded into norms and into the matrices before and after them, so the resulting model has the same form
and computes the same function. The quantizers that follow in the recipe define the rounding whose error counts.
Shape suffixes: O out, I in, C channels of a writer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from compress.errors import RecipeError, UnsupportedWeight
from compress.model.block import Block
from compress.model.globs import matches
from compress.model.reshaped import Reshaped, check_logits
from compress.model.scaling import Pair, Scale, pairs_of, scaled_model
from compress.model.site import Site
from compress.model.source import Checkpoint
from compress.model.walk import Walk
from compress.model.whole import Whole
from compress.passes.base import GridQuantizer, Pass, Quantizer, Reshape


@dataclass(frozen=True, kw_only=True)
class Equalizer(Reshape):
    """Scale channels between writers and readers so that the quantizers that follow lose less."""

    def check(self, after: Sequence[Pass]) -> None:
        """Raise RecipeError if no quantizer follows."""
        if not any(isinstance(step, Quantizer) for step in after):
            raise RecipeError(f"{self.name}: no quantizer follows; add rtn or gptq after it")

    def outline(self, walk: Walk, source: Checkpoint) -> Reshaped:
        """The model itself, with no scale changed."""
        return scaled_model(source, walk.anatomy, {}, "with no scale changed")

    def reshape(self, model: Whole, source: Checkpoint) -> Reshaped:
        """The model with the best scales; costs two forwards over the calibration tokens, and the searches.

        Raises UnsupportedWeight if the model has no norm or linear map that can take over a scale.
        """
        steps = [step for step in model.passes if isinstance(step, Quantizer)]
        scales: dict[str, Scale] = {}
        chosen: dict[str, float] = {}
        moved: set[str] = set()
        for block in model.blocks(self.requires):
            for pair in pairs_of(block, model.config):
                if any(quantizer_of(site, steps) for site in pair.readers):
                    scale_C, chosen[pair.writer] = self.best(block, pair, steps)
                    if scale_C is not None:
                        moved.add(pair.writer)
                        for name, scale in pair.scales(scale_C).items():
                            scales[name] = scales[name].then(scale) if name in scales else scale
            for site in block.sites.values():
                site.stats.forget()
        if not chosen:
            raise UnsupportedWeight(
                f"{self.name}: no norm or linear map of {type(model.walk.model).__name__} can take over a scale"
            )
        change = f"with scales moved at {len(moved)} of {len(chosen)} inputs"
        made = scaled_model(source, model.walk.anatomy, scales, change, chosen=chosen)
        check_logits(made, model.walk, model.probe_NT, model.walk.dense_logits, self.name)
        return made

    def best(self, block: Block, pair: Pair, steps: Sequence[Quantizer]) -> tuple[Tensor | None, float]:
        """(scales [C], or None to leave the pair as it is; the option value that gave them, for the record)."""
        raise NotImplementedError


def quantizer_of(site: Site, steps: Sequence[Quantizer]) -> Quantizer | None:
    """The first quantizer that will quantize a site, or None."""
    return next((step for step in steps if matches(site.name, step.sites)), None)


def rounded(w_OI: Tensor, site: Site, steps: Sequence[Quantizer]) -> Tensor:
    """The matrix rounded to nearest by its quantizer, without a search of ranges; unchanged if it has none."""
    step = quantizer_of(site, steps)
    if step is None:
        return w_OI
    step = replace(step, search=False) if isinstance(step, GridQuantizer) and step.search else step
    return step.round(w_OI, None, site).dense()
