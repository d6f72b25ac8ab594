"""TransMLA: keys and values computed from one latent vector, which is then all that a cache must keep of a token.

Not here: the cache itself (`runtime/latent.py`; a recipe asks for it with `kv: latent`). What a reader would question:
at full rank nothing is lost and nothing is gained, so the pass has no lossless default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Annotated

from pydantic import Field

from compress.errors import RecipeError, UnsupportedWeight
from compress.model.site import Site
from compress.passes.base import WeightPass
from compress.passes.factorizer import factors_outline, joined
from compress.stats import Gram
from compress.weights import Dense, Weight

PAIR = ("k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class TransMLA(WeightPass, name="transmla"):
    """W_k = A_k B and W_v = A_v B, with B the principal directions of keys and values together, balanced.

    Keys and values are first divided by the root of their own output energy; otherwise keys, which are larger, would
    take all directions. At `kept: 1` the model computes what it did, with no fewer numbers to keep of a token. With
    fewer numbers, the result is the closest for that number, in that norm and without training, which is not close: see
    the numbers in the recipe.
    Source: Meng et al., "TransMLA: Multi-Head Latent Attention Is All You Need", 2025, section 4 (joint, balanced
    principal components of keys and values). Deviation: no RoRoPE, FreqFold or decoupled rotary key; a key is computed
    whole from the latent and rotated when it is read. So nothing else is kept, but attention is not computed in the
    latent space.
    """

    requires = (Gram,)
    unfed = ""
    takes = ("dense",)
    gives = "factored"
    on_differences = False  # a latent holds keys and values, not what fine-tuning added to them

    sites: Annotated[
        str, Field(description="glob over full site names; keys and values only, both of each attention")
    ] = "*.[kv]_proj"
    kept: Annotated[
        float, Field(gt=0, le=1, description="size of the latent as a share of the numbers of a token's key and value")
    ] = 0.5

    @property
    def joint(self) -> bool:
        """True: keys and values are factored together."""
        return True

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError if not even a rank of one is left."""
        if self.rank(2 * shape[0], shape[1]) < 1:
            raise RecipeError(
                f"{self.name}: {site}: kept: {self.kept:g} of {2 * shape[0]} numbers gives a latent of size 0; raise "
                "kept"
            )

    def rank(self, outputs: int, inputs: int) -> int:
        """The size of a latent, at most the number of inputs, beyond which it would hold no more information."""
        return min(floor(self.kept * outputs + 1e-9), inputs)

    def rewrite(self, site: Site) -> Weight:
        """A latent of its own."""
        return self.of_one([site])[site.name]

    def rewrite_peers(self, sites: Sequence[Site]) -> Mapping[str, Weight]:
        """One latent for key and value of each attention; raises UnsupportedWeight for any other combination."""
        return {name: weight for pair in self.pairs(sites) for name, weight in self.of_one(pair).items()}

    def outline_peers(self, sites: Sequence[Site]) -> Mapping[str, Weight | None]:
        """The same, without values."""
        found: dict[str, Weight | None] = {}
        for pair in self.pairs(sites):
            whole = {site.name: site.expect(Dense, by=self.name) for site in pair}
            rank = self.rank(sum(site.shape[0] for site in pair), pair[0].shape[1])
            found |= factors_outline(list(whole), list(whole.values()), rank)
        return found

    def pairs(self, sites: Sequence[Site]) -> list[list[Site]]:
        """Key and value of each attention; raises UnsupportedWeight for any other combination."""
        attentions: dict[str, list[Site]] = {}
        for site in sites:
            attentions.setdefault(site.name.rpartition(".")[0], []).append(site)
        for within, pair in attentions.items():
            leaves = [site.name.rpartition(".")[2] for site in pair]
            if tuple(sorted(leaves)) != PAIR:
                raise UnsupportedWeight(
                    f"{self.name} needs {' and '.join(PAIR)} with the same input; {within} has {', '.join(leaves)}"
                )
        return list(attentions.values())

    def of_one(self, sites: Sequence[Site]) -> dict[str, Weight]:
        """These weights as products with one shared latent projection."""
        whole = [site.expect(Dense, by=self.name) for site in sites]
        rank = self.rank(sum(site.shape[0] for site in sites), sites[0].shape[1])
        return joined(sites, whole, sites[0].stats[Gram], rank)
