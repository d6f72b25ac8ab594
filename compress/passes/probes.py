"""The cost of rewriting one part of the model alone: probe windows, run to the logits with everything else dense.

Shape suffixes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from compress.model.block import Block
from compress.model.divergence import mean_kl
from compress.model.site import Site, energy
from compress.model.whole import Whole
from compress.passes.base import WeightPass
from compress.stats import Gram

LEAST = 1e-9  # nats; assigned to a part whose rewriting has no visible effect


class Probes:
    """The hidden states of the probe, one copy for each rewritten part, propagated through the blocks that follow."""

    def __init__(self, model: Whole) -> None:
        self.model = model
        self.batch = model.walk.enter(model.probe_NT)
        self.hidden: list[Tensor] = []

    def follow(self, block: Block) -> None:
        """Propagate the copies taken so far through this block, which is dense."""
        self.hidden = [self.batch.through(block.module, block.index, hidden) for hidden in self.hidden]

    def take(self, block: Block) -> None:
        """Keep the output of this block, as it is now, for the dense model's hidden states."""
        self.hidden.append(block.probe.through(block.module, block.index))

    def costs(self) -> list[float]:
        """The KL divergence from the dense model of each copy, in nats; may be non-finite."""
        return [self.cost(hidden) for hidden in self.hidden]

    def cost(self, hidden_BTD: Tensor) -> float:
        """The KL divergence of the logits that follow from a hidden state after the last block, in nats."""
        self.batch.hidden_BTD = hidden_BTD
        cost = mean_kl(self.model.walk.dense_logits, self.model.walk.leave(self.batch))
        return max(LEAST, cost) if math.isfinite(cost) else cost


@contextmanager
def rewritten(sites: Sequence[Site], step: WeightPass) -> Iterator[None]:
    """Rewrite these sites by `step` inside the context, together if they read one input; then restore them."""
    fed = [site for site in sites if not (site.starved and step.requires)]
    together = all(site.stats is fed[0].stats for site in fed)
    made = step.rewrite_peers(fed) if fed and together else {site.name: step.rewrite(site) for site in fed}
    for site in sites:
        site.weight = made[site.name] if site.name in made else step.rewrite_unfed(site)
    try:
        yield
    finally:
        for site in sites:
            site.weight, site.inputs = site.original, ""


def output_cost(site: Site) -> float:
    """tr(D G Dᵀ) / tr(W G Wᵀ); 0 for an expert that no token reached or whose Gram was not measured."""
    if Gram not in site.stats or not site.stats.tokens:
        return 0.0
    gram_II, w_OI = site.stats[Gram], site.original.data.float()
    return float(energy(site.weight.dense().float() - w_OI, gram_II) / energy(w_OI, gram_II).clamp(min=1e-30))
