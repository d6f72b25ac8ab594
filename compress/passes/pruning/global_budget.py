"""A budget from one competition of scores over the whole model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import RecipeError
from compress.model.globs import matches
from compress.model.whole import Whole
from compress.passes.base import Budget, Pruner, Sparsity, WeightPass
from compress.passes.budget import as_asked, density

COARSE = 14  # low bits of a float32 that are dropped: scores in one bin differ by at most a part in 512


@dataclass(frozen=True, kw_only=True)
class Global(Budget, name="global"):
    """Compare the scores of all sites with one threshold: the share of a site's scores below it is its sparsity.

    With a pruner that competes over whole matrices, the masks are then those of one competition over the model, up to
    the resolution of the scores, a part in 512. It serves magnitude, wanda and ria. Their scores are not comparable
    across layers (what is large in one is small in another), so measure the result before relying on it.
    Source: Han et al., "Learning both Weights and Connections", NeurIPS 2015, one threshold for all layers.
    """

    def check(self, step: WeightPass) -> None:
        """Raise RecipeError unless the pass is a pruner with scores that exist before pruning begins."""
        if not isinstance(step, Pruner) or type(step).score is Pruner.score:
            raise RecipeError(
                f"{self.name}: {step.name} has no scores to compare; use magnitude, wanda or ria after it"
            )

    def allocate(self, model: Whole, step: Pruner) -> dict[str, Sparsity]:
        """The share of each site's scores below the threshold that drops as much as `step` asks for."""
        counts: dict[str, Tensor] = {}
        for block in model.blocks(step.requires, step.sites):
            for site in block.sites.values():
                if (
                    not site.idle
                    and matches(site.name, step.sites)
                    and all(kind in site.stats for kind in step.requires)
                ):
                    counts[site.name] = bins(step.score(site))
        if not counts:
            return {}
        total = torch.stack(list(counts.values())).sum(0)
        sizes = {name: int(count.sum()) for name, count in counts.items()}
        drop = (1 - density(step.sparsity)) * sum(sizes.values())
        last = int((total.cumsum(0) < drop).sum())
        inside = (drop - int(total[:last].sum())) / max(1, int(total[min(last, len(total) - 1)]))
        keep = {
            name: 1 - (int(count[:last].sum()) + inside * int(count[min(last, len(count) - 1)])) / sizes[name]
            for name, count in counts.items()
        }
        return as_asked(step.sparsity, keep, sizes)


def bins(score_OI: Tensor) -> Tensor:
    """The number of scores in each bin, by leading bits, which order non-negative floats.

    Raises RecipeError if a score is negative.
    """
    codes = score_OI.float().contiguous().view(torch.int32) >> COARSE
    if bool((codes < 0).any()):
        raise RecipeError("global: scores must not be negative")
    return torch.bincount(codes.flatten(), minlength=1 << (31 - COARSE)).cpu()
