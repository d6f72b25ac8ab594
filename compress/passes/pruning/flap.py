"""FLAP: remove heads and neurons whose values fluctuate least, and replace them by their means.

Shape suffixes: O out, I in, T tokens, G groups, C channels of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from compress.model.site import Site
from compress.passes.structured import StructuredPruner
from compress.stats import Moments


@dataclass(frozen=True, kw_only=True)
class FLAP(StructuredPruner, name="flap"):
    """Remove heads and neurons by variance * ||w||^2 of the inputs of o_proj and down_proj; biases absorb their means.

    The score of a head is the mean square of its channels' scores. Removing an input whose value hardly changes costs
    little once its mean is in the bias; `compensate` needs a family whose config allows biases there.
    Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, the metric
    WIFV and its bias compensation. Deviations: equally many from every block, because a configuration has one head
    count and one width, so scores need not be standardised across blocks; a head is a whole key-value group; each block
    is measured after the removals before it; variances are exact, and every batch counts.
    """

    requires = (Moments,)

    compensate: Annotated[bool, Field(description="add the mean contribution of the removed inputs to a bias")] = True

    def score(self, site: Site) -> Tensor:
        """Variance of each input times the squared norm of its weight column, [in]."""
        return site.stats[Moments][1] * site.original.data.float().square().sum(0)

    def pool(self, score_GC: Tensor) -> Tensor:
        """The mean square over the channels of a group, [groups]; for one channel, in the order of its score."""
        return score_GC.square().mean(1)

    def constant(self, site: Site) -> Tensor:
        """The mean of each input if biases may take it over, else 0."""
        return site.stats[Moments][0] if self.compensate else super().constant(site)

    @property
    def compensates(self) -> bool:
        """The option `compensate`."""
        return self.compensate
