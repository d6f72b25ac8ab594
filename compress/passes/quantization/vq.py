"""Vector quantization: several weights share one code, chosen with error feedback.

The loop is `feed_back` with vectors in place of columns; the codebooks are defined here. What a reader would question:
the codes are not those of the nearest entries, but of those that leave the least error after feedback, which matters
more than the choice of the book.
Shape suffixes: O out, I in, N vectors, K entries, D entries of a vector, V vectors of a row, B columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError, UnsupportedWeight
from compress.model.site import Site
from compress.passes.base import Quantize, Quantizer
from compress.passes.feedback import feed_back
from compress.passes.hessian import shared_factor
from compress.passes.kmeans import fit_book
from compress.passes.quantization.rotate import Seed, random_hadamard, rotation_outline
from compress.stats import Gram, Statistic
from compress.weights import BOOKS, Codebook, Dense, Hadamard, Masked, Product, Sum, Weight
from compress.weights.grid import narrowed, stored_scale
from compress.weights.lattice import nearest, nearest_e8p

SPREAD = {2: 1.0, 3: 0.98, 4: 0.95}  # RMS of a row in units of e8p, by bits; measured, between QuIP#'s 0.9 and 1.03
FINER = {3: ("e8", 2.04), 4: ("e8p", 3.45)}  # the book for the residual and how much finer it is; QuIP#, released code
LARGEST = 12  # bits of a k-means code: with more, the book would be larger than most matrices


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A book [K, D] and the scale [out, 1] of the rows that it codes; `name` if the book is one of `BOOKS`."""

    book_KD: Tensor
    scale: Tensor
    name: str = ""

    def find(self, x_OD: Tensor, metric_DD: Tensor) -> Tensor:
        """The codes [out] of the entries b of least |(x - scale b) M| with M = `metric_DD`."""
        x_OD = unscaled(x_OD, self.scale)
        if self.name == "e8p":
            return nearest_e8p(x_OD, metric_DD)
        return nearest(x_OD @ metric_DD, self.book_KD.float() @ metric_DD)[0].int()

    def values(self, codes_O: Tensor) -> Tensor:
        """The values of codes, [out, D]."""
        return self.book_KD[codes_O.long()].float() * self.scale.float()


class Vectors:
    """A rounding to books, each coding the residual of those before it, which collects the codes.

    `metrics_VDD` are the metrics by which entries are compared, in the order in which the vectors are coded.
    """

    def __init__(self, stages: Sequence[Stage], rows: int, metrics_VDD: Tensor) -> None:
        self.stages, self.metrics_VDD = stages, metrics_VDD
        self.aligned = self.width = metrics_VDD.shape[1]
        size = (rows, len(metrics_VDD))
        self.codes = [torch.empty(size, dtype=torch.int32, device=metrics_VDD.device) for _ in stages]

    def round(self, column: int, ahead_BO: Tensor, keep_BO: Tensor | None) -> Tensor:
        """The entries for the next vector of every row, [D, out]; single weights cannot be cut from a vector."""
        del keep_BO
        vector = column // self.width
        left_OD = ahead_BO[: self.width].T
        values_OD = torch.zeros_like(left_OD)
        for stage, codes_OV in zip(self.stages, self.codes, strict=True):
            codes_OV[:, vector] = stage.find(left_OD - values_OD, self.metrics_VDD[vector])
            values_OD = values_OD + stage.values(codes_OV[:, vector])
        return values_OD.T

    def result(self, order_V: Tensor) -> Weight:
        """The coded matrix; `order_V` gives the vector at each position of the order."""
        back_V = order_V.argsort()
        leaves = [
            Codebook(codes_OV[:, back_V], stage.book_KD, Dense(stage.scale), stage.name)
            for stage, codes_OV in zip(self.stages, self.codes, strict=True)
        ]
        return leaves[0] if len(leaves) == 1 else Sum(tuple(leaves))


def encode(w_OI: Tensor, stages: Sequence[Stage], upper_II: Tensor, order_V: Tensor) -> Weight:
    """W coded vector by vector in the order `order_V`, each error fed back to the vectors after it.

    `upper_II` is the factor of the inverse Gram in that order. After the best feedback a vector's error is |(w - q)
    U_vv^-1|², so codes are compared by that.
    Source: Tseng et al., QuIP#, ICML 2024, section 4.1, block-LDLQ. Deviations: in the paper codes are nearest without
    a metric, and vectors go from last to first.
    """
    width = w_OI.shape[1] // len(order_V)
    order_I = columns_of(order_V, width)
    blocks_VDVD = upper_II.unflatten(0, (-1, width)).unflatten(2, (-1, width))
    vectors = Vectors(stages, w_OI.shape[0], torch.linalg.inv(blocks_VDVD.diagonal(dim1=0, dim2=2).movedim(2, 0)))
    feed_back(w_OI[:, order_I], upper_II, vectors)
    return vectors.result(order_V)


def columns_of(order_V: Tensor, width: int) -> Tensor:
    """The columns of vectors of `width`, in the order of the vectors."""
    return (order_V[:, None] * width + torch.arange(width, device=order_V.device)).flatten()


def row_scales(w_OI: Tensor, spread: float) -> Tensor:
    """The scales [out, 1] that give each row a root mean square of `spread`, as stored; 0 for rows of zeros."""
    own_O1 = w_OI.square().mean(1, keepdim=True).sqrt()
    scale = narrowed(stored_scale(own_O1.masked_fill(own_O1 == 0, 1.0) / spread))
    return scale.masked_fill(own_O1 == 0, 0)


def lattice_stages(w_OI: Tensor, bits: int) -> list[Stage]:
    """E8P for 2 bits; its residual is coded by points of E8 for 3 bits, or by E8P again for 4."""
    books = [("e8p", SPREAD[bits])]
    if bits in FINER:
        name, finer = FINER[bits]
        books.append((name, SPREAD[bits] * finer))
    return [Stage(book_KD=BOOKS[n].to(w_OI.device), scale=row_scales(w_OI, spread), name=n) for n, spread in books]


def fitted_stages(w_OI: Tensor, bits: int, dims: int, energy_I: Tensor, seed: int) -> list[Stage]:
    """A book of 2**(bits dims) entries by k-means of the rows, each scaled to a root mean square of 1; float16."""
    scale = row_scales(w_OI, 1.0)
    x_ND = unscaled(w_OI, scale).reshape(-1, dims)
    weight_ND = energy_I.expand_as(w_OI).reshape(-1, dims)
    return [Stage(book_KD=fit_book(x_ND, weight_ND, 2 ** (bits * dims), seed).half(), scale=scale)]


def unscaled(w_OI: Tensor, scale: Tensor) -> Tensor:
    """W / scale; 0 where that would be 0 / 0."""
    return w_OI / scale.float().clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class VQ(Quantizer, name="vq"):
    """Code vectors of a row's weights by the lattice book E8P or by k-means, compensating errors in later vectors.

    Vectors are coded in order of falling activation energy, which costs nothing to store. If no damping makes the Gram
    positive definite, nearest codes are taken and a fallback is recorded. A pruned weight is refused, because its zeros
    would have to be coded like any other weight.
    Source: Tseng et al., "QuIP#", ICML 2024, sections 3 to 5, with 3 and 4 bits by coding twice; van Baalen et al.,
    "GPTVQ", 2024, for k-means with feedback. Deviations: see `encode`; one scale per row; outputs are not rotated.
    """

    unfed = "coded to nearest"
    takes = ("dense", "permuted", "rotated")

    book: Annotated[
        Literal["e8p", "kmeans"],
        Field(description="the fixed lattice of 65,536 points, or a codebook fitted by k-means"),
    ] = "e8p"
    bits: Annotated[
        Literal[2, 3, 4], Field(description="bits per weight, not counting scales and fitted codebooks")
    ] = 2
    dims: Annotated[
        Literal[1, 2, 4] | None, Field(description="inputs per k-means vector, 2 by default; e8p has 8")
    ] = None
    rotate: Annotated[bool, Field(description="code the weight after a randomised Hadamard rotation of its inputs")] = (
        True
    )
    seed: Seed = 0
    damping: Annotated[float, Field(gt=0, le=1, description="share of mean(diag G) added to the diagonal")] = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.book == "e8p" and self.dims is not None:
            raise RecipeError(f"{self.name}.dims: the book e8p always has 8 dims; they can be chosen only for kmeans")
        if self.book == "kmeans" and self.bits * self.width > LARGEST:
            raise RecipeError(
                f"{self.name}.dims: {self.bits} bits x {self.width} dims need a book of 2**{self.bits * self.width} "
                f"entries; 2**{LARGEST} are allowed"
            )

    @property
    def requires(self) -> tuple[type[Statistic], ...]:  # type: ignore[override]
        """The Gram."""
        return (Gram,)

    @property
    def width(self) -> int:
        """The number of inputs that one code covers."""
        return 8 if self.book == "e8p" else self.dims or 2

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError if the vectors do not divide the width."""
        if shape[1] % self.width:
            raise RecipeError(f"{self.name}: {site}: vectors of {self.width} do not divide its width of {shape[1]}")

    def visit(self, weight: Weight, site: Site, quantize: Quantize) -> Weight:
        """Quantize as any quantizer does; raises UnsupportedWeight for a weight under a mask."""
        if isinstance(weight, Masked):
            raise UnsupportedWeight(
                f"{self.name} codes {self.width} weights together and cannot leave out the pruned ones of {site.name}; "
                "quantize it with gptq, or leave it dense"
            )
        return super().visit(weight, site, quantize)

    def quantize(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """Codes with error feedback; nearest codes, with a fallback recorded, if the Gram has no inverse factor."""
        return self.coder(site)(w_OI.float())

    def round(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """The nearest codes."""
        if not self.rotate:
            return self.nearest(w_OI.float())
        turn = rotation_outline(site.shape[1], self.seed) if w_OI.is_meta else self.turn(site)
        return Product(self.nearest(w_OI.float() if w_OI.is_meta else turn.linear(w_OI.float())), turn)

    def round_factor(self, factor: Tensor, keep: Tensor | None, site: Site) -> Weight:
        """The nearest codes, not rotated.

        Raises UnsupportedWeight for a pruned factor, or if vectors do not divide its width.
        """
        if keep is not None:
            raise UnsupportedWeight(
                f"{self.name}: {site.name}: a pruned factor has zeros, which would be coded as well"
            )
        if factor.shape[1] % self.width:
            raise UnsupportedWeight(
                f"{self.name}: {site.name}: vectors of {self.width} do not divide the rank of {factor.shape[1]}; "
                "use another rank, or factors: false"
            )
        return self.nearest(factor.float())

    def turn(self, site: Site) -> Hadamard:
        """The rotation of the site's input; sites of equal width share it."""
        return Hadamard(random_hadamard(site.shape[1], self.seed).positive.to(site.original.data.device))

    def coder(self, site: Site) -> Callable[[Tensor], Weight]:
        """A function that codes any matrix [out, in], float32, by the site's statistics."""
        if self.rotate:
            turn = self.turn(site)
            behind = site.behind(turn, site.weight)
            behind.stats = site.stats.derived(("rotated", self.seed), lambda: behind.stats)  # caches its factor too
            inner = replace(self, rotate=False).coder(behind)
            return lambda w_OI: Product(inner(turn.linear(w_OI)), turn)
        energy_I = site.stats[Gram].diagonal()
        order_V = energy_I.unflatten(0, (-1, self.width)).sum(1).argsort(descending=True, stable=True)
        order_I = columns_of(order_V, self.width)
        upper_II = shared_factor(site, self.damping, self.name, "nearest codes", order_I)
        if upper_II is None:
            return self.nearest
        return lambda w_OI: encode(w_OI, self.stages(w_OI, energy_I), upper_II, order_V)

    def nearest(self, w_OI: Tensor) -> Weight:
        """W coded without feedback, as for uncorrelated inputs of equal energy."""
        if w_OI.is_meta:
            return self.formed(w_OI)
        inputs = w_OI.shape[1]
        order_V = torch.arange(inputs // self.width, device=w_OI.device)
        alike_I = torch.ones(inputs, device=w_OI.device)
        return encode(w_OI, self.stages(w_OI, alike_I), torch.diag(alike_I), order_V)

    def formed(self, w_OI: Tensor) -> Weight:
        """The form of a coded matrix on the meta device."""
        scale, finer = (w_OI.new_empty(w_OI.shape[0], 1, dtype=torch.float16) for _ in range(2))
        codes_OV = w_OI.new_empty(w_OI.shape[0], w_OI.shape[1] // self.width, dtype=torch.int32)
        if self.book == "kmeans":
            return Codebook(codes_OV, scale.new_empty(2 ** (self.bits * self.width), self.width), Dense(scale))
        books = [("e8p", scale)] + ([(FINER[self.bits][0], finer)] if self.bits in FINER else [])
        leaves = [Codebook(codes_OV, BOOKS[name].to("meta"), Dense(own), name) for name, own in books]
        return leaves[0] if len(leaves) == 1 else Sum(tuple(leaves))

    def stages(self, w_OI: Tensor, energy_I: Tensor) -> list[Stage]:
        """The books, fitted to W if they are not fixed."""
        if self.book == "e8p":
            return lattice_stages(w_OI, self.bits)
        return fitted_stages(w_OI, self.bits, self.width, energy_I, self.seed)
