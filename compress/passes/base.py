"""The base classes of passes: frozen sets of options with a function, usually from a site to a new weight expression.

A pass opens no files, chooses no device and shows no progress. Its dataclass fields are the recipe's options, typed and
described by `Annotated[type, Field(...)]`; its class statement registers it under a name. A `WeightPass` rewrites one
site at a time and does not touch the module; a `BlockPass` rewrites all selected sites of a block together. A `Budget`
looks at the whole dense model first and sets an option, such as the sparsity, for each site. A `Reshape` runs before
all of these and makes a model of another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError, UnsupportedWeight
from compress.model.block import Block
from compress.model.reshaped import Reshaped
from compress.model.site import Site
from compress.model.source import Checkpoint
from compress.model.walk import Walk
from compress.model.whole import Whole
from compress.options import check_options
from compress.passes.whitened import answer
from compress.stats import ColumnNorm, Gram, Statistic
from compress.weights import (
    Dense,
    Diagonal,
    Grid,
    Hadamard,
    Masked,
    Pattern,
    Permutation,
    Product,
    Sum,
    Weight,
    pattern,
)

PASSES: dict[str, type[Pass]] = {}
Sparsity = float | str
Quantize = Callable[[Tensor, "Tensor | None", Site], Weight]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One step of a recipe.

    `requires` lists the statistics that it reads; it is a property where the options decide. Raises RecipeError at
    construction if an option has the wrong type or is out of range.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[tuple[type[Statistic], ...]] = ()

    def __init_subclass__(cls, name: str | None = None) -> None:
        """Register the class under `name`; a class without a name is an abstract parent."""
        if name is not None:
            if name in PASSES and PASSES[name].__qualname__ != cls.__qualname__:
                raise TypeError(f"two passes are named {name!r}")
            cls.name = name
            PASSES[name] = cls

    def __post_init__(self) -> None:
        check_options(self, self.name)

    def options(self) -> dict[str, Any]:
        """Every option with its value, as a recipe would write it."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __str__(self) -> str:
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in changed.items())})"


@dataclass(frozen=True, kw_only=True)
class SitePass(Pass):
    """A pass that rewrites the weights of the sites it selects: a `WeightPass` or a `BlockPass`."""

    unfed: ClassVar[str] = ""  # what it does instead at an expert that too few tokens reached, for the record
    # the forms it can rewrite, of dense, pruned, split, factored, permuted, rotated, quantized and signed; with () this
    # is not checked beforehand, and the run finds out
    takes: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[str] = ""  # the form of the result; "" if not stated
    on_differences: ClassVar[bool] = True  # whether it can be applied to the difference from a base model

    sites: Annotated[str, Field(description="globs over full site names, separated by spaces; ! excludes")] = "*"

    def leaves(self, form: str) -> str:
        """The form of the result for a weight that has this form, one of `takes`; "" if not stated."""
        del form
        return self.gives

    @property
    def joint(self) -> bool:
        """Whether it must be given the sites that read one input together."""
        return False

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError if a weight of `shape` at `site` cannot be handled; called before any work."""

    @property
    def foreseen(self) -> bool:
        """Whether the result takes exactly the bytes of its outline; if not, the outline gives the most it can take."""
        return True

    def outline(self, site: Site) -> Weight | None:
        """The expression that it will leave at a site, without the values; the site's weight is on the meta device.

        Returns None where the form depends on the values. A tensor that the pass does not change, such as a mask, is
        the same object in the outline.
        """
        del site
        return None

    def outline_peers(self, sites: Sequence[Site]) -> Mapping[str, Weight | None]:
        """The outline of each of these sites, which read one input, by name."""
        return {site.name: self.outline(site) for site in sites}


@dataclass(frozen=True, kw_only=True)
class WeightPass(SitePass):
    """A pass that rewrites one site's weight at a time, or the weights of the sites that read one input.

    `shared_out` names the option that a budget may set for each site; it is empty if there is none.
    """

    shared_out: ClassVar[str] = ""

    def rewrite(self, site: Site) -> Weight:
        """The new expression for the site's weight."""
        raise NotImplementedError

    def rewrite_peers(self, sites: Sequence[Site]) -> Mapping[str, Weight]:
        """The new expression for each of these sites, which read one input, by name; by default each on its own.

        Only a `joint` pass is given more than one site at a time.
        """
        return {site.name: self.rewrite(site) for site in sites}

    def rewrite_unfed(self, site: Site) -> Weight:
        """The new expression for an expert that too few calibration tokens reached, made without its statistics.

        Raises UnsupportedWeight unless a subclass overrides it.
        """
        raise UnsupportedWeight(
            f"{self.name}: only {site.stats.tokens} tokens reach {site.name}, {site.needed} are needed; "
            "give more calibration samples or deselect it"
        )


@dataclass(frozen=True, kw_only=True)
class BlockPass(SitePass):
    """A pass that rewrites all selected weights of a block together, judged by the output of the block.

    By then the passes before it have rewritten every site of the block. `block.batches` holds the hidden states that
    the compressed blocks before it compute from the calibration windows; `block.targets()` gives the hidden states of
    the dense model after this block. An expert that too few tokens reached is left as it was.
    """

    requires = (ColumnNorm,)  # only for its token count, which tells how many tokens reach each expert
    unfed: ClassVar[str] = "left as it was"

    batch: Annotated[int, Field(ge=1, description="calibration windows seen at once")] = 4

    def rewrite(self, block: Block, sites: Sequence[Site]) -> Mapping[str, Weight]:
        """The new expression for the weight of each of `sites`, by name."""
        raise NotImplementedError


def needs_twins(passes: Iterable[Pass]) -> bool:
    """Whether any of these passes needs the calibration windows run through the dense model as well."""
    return any(isinstance(step, BlockPass) or any(kind.paired for kind in step.requires) for step in passes)


def windows_at_once(passes: Iterable[Pass]) -> int | None:
    """The number of calibration windows in a batch, if a pass sets it; raises RecipeError if two passes differ."""
    asked = {step.batch: step.name for step in passes if isinstance(step, BlockPass)}
    if len(asked) > 1:
        raise RecipeError(f"passes: {' and '.join(f'{asked[n]}.batch is {n}' for n in sorted(asked))}; make them equal")
    return next(iter(asked), None)


@dataclass(frozen=True, kw_only=True)
class Pruner(WeightPass):
    """A pass that keeps the weights with the highest scores, unchanged; a subclass defines the score."""

    shared_out = "sparsity"
    unfed: ClassVar[str] = "pruned by magnitude"
    takes: ClassVar[tuple[str, ...]] = ("dense",)
    gives: ClassVar[str] = "pruned"

    sparsity: Annotated[
        Sparsity, Field(description="fraction dropped, or n:m with n KEPT of every m inputs of a row")
    ] = 0.5
    scope: Annotated[
        str, Field(description="the weights compared with each other: row, matrix, or whole blocks such as 16x16")
    ] = "row"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.pattern()
        except RecipeError as error:
            raise RecipeError(f"{self.name}.{error}") from error

    def pattern(self) -> Pattern:
        """The pattern defined by `sparsity` and `scope`."""
        return pattern(self.sparsity, self.scope)

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError if the pattern does not fit the matrix."""
        reason = self.pattern().check(shape)
        if reason:
            raise RecipeError(f"{self.name}: {site}: {reason}")

    def score(self, site: Site) -> Tensor:
        """The score of each weight, [out, in]; the highest are kept."""
        raise NotImplementedError

    def rewrite(self, site: Site) -> Weight:
        """The same values under a mask that keeps the highest scores."""
        return self.cut(site, self.score)

    def rewrite_unfed(self, site: Site) -> Weight:
        """The same pattern by magnitude, because without input statistics only the weight itself is known."""
        return self.cut(site, lambda site: site.weight.dense().abs())

    def cut(self, site: Site, score: Callable[[Site], Tensor]) -> Weight:
        """The dense weight under a mask that keeps the highest scores."""
        dense = site.expect(Dense, by=self.name)
        chosen = self.pattern()
        return Masked(dense, chosen.keep(score(site)), chosen.name)

    def outline(self, site: Site) -> Weight | None:
        """The dense weight under a mask on the meta device that keeps as many entries as the pattern."""
        return masked_outline(site.expect(Dense, by=self.name), self.pattern())


def plain(weight: Weight) -> bool:
    """Whether a weight is a plain matrix, with or without a mask."""
    match weight:
        case Dense() | Masked(Dense()):
            return True
        case _:
            return False


def masked_outline(values: Weight, chosen: Pattern) -> Masked:
    """`values` under a mask on the meta device that keeps as many entries as the pattern."""
    mask_OI = torch.empty(values.shape, dtype=torch.bool, device="meta")
    return Masked(values, mask_OI, chosen.name, chosen.kept(values.shape))


@dataclass(frozen=True, kw_only=True)
class Refiner(WeightPass):
    """A pass that improves a pruned weight: another mask of the same counts, or better values under the same mask.

    `moves` says whether it moves single weights, which a mask of blocks refuses.
    """

    moves: ClassVar[bool] = True

    unfed: ClassVar[str] = "left as it was"
    takes: ClassVar[tuple[str, ...]] = ("pruned",)
    gives: ClassVar[str] = "pruned"

    def masked(self, site: Site) -> tuple[Tensor, Masked]:
        """The kept values, float32 [out, in] with 0 where the mask cuts, and the weight.

        Raises UnsupportedWeight unless the weight is a plain matrix under a mask.
        """
        match site.weight:
            case Masked(Dense(w_OI), mask_OI, _) as weight:
                return w_OI.float().masked_fill(~mask_OI, 0), weight
            case _:
                raise UnsupportedWeight(
                    f"{self.name} needs unquantized values under a mask; {site.name} is {site.weight.describe()}"
                )

    def group(self, site: Site, weight: Masked) -> int:
        """The m of an n:m mask, or 0 for a mask in which rows or the matrix compete.

        Raises UnsupportedWeight for a mask of blocks, because swapping single weights would break the blocks.
        """
        if "b" in weight.pattern:
            raise UnsupportedWeight(f"{self.name} moves single weights; {site.name} is pruned in blocks")
        return int(weight.pattern.split(":")[1]) if ":" in weight.pattern else 0

    def remasked(self, site: Site, w_OI: Tensor, mask_OI: Tensor, pattern: str) -> Masked:
        """`w_OI` under `mask_OI`, in the dtype of the model."""
        return Masked(Dense(w_OI.masked_fill(~mask_OI, 0).to(site.original.data.dtype)), mask_OI, pattern)

    def rewrite_unfed(self, site: Site) -> Weight:
        """The unchanged weight: without input statistics there is no criterion to improve it by."""
        self.masked(site)
        return site.weight

    def outline(self, site: Site) -> Weight | None:
        """The same form with new values and a new mask that keeps as many entries; None for any other form."""
        match site.weight:
            case Masked(Dense(data)) as weight:
                if self.moves:
                    self.group(site, weight)
                return replace(weight, values=Dense(torch.empty_like(data)), mask_OI=torch.empty_like(weight.mask_OI))
            case _:
                return None


@dataclass(frozen=True, kw_only=True)
class Budget(Pass):
    """A pass that decides, before anything is rewritten, how much the next pass it governs keeps of each site."""

    options_set: ClassVar[tuple[str, ...]] = ("sparsity",)  # the options that it can set for each site

    def check(self, step: WeightPass) -> None:
        """Raise RecipeError if it cannot set an option of this pass."""

    def likely(self, step: WeightPass) -> tuple[tuple[float, WeightPass], ...]:
        """The pass as it will be on average: shares of the weights, which sum to 1, and the pass with its options."""
        return ((1.0, step),)

    def allocate(self, model: Whole, step: Any) -> dict[str, Sparsity]:
        """The value of the option `step.shared_out` for each site that `step` selects.

        Weighted by parameters, the values average to what `step` asks for.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Reshape(Pass):
    """A pass that makes another ordinary model: fewer blocks, heads or neurons, a narrower hidden state, other scales.

    It always runs the model, so it needs calibration data even if it requires no statistics.
    """

    def check(self, after: Sequence[Pass]) -> None:
        """Raise RecipeError if the passes that follow it in a recipe do not fit it."""

    def outline(self, walk: Walk, source: Checkpoint) -> Reshaped:
        """A model of the shape that `reshape` will give, with the parts to keep chosen without looking at any weight.

        The passes that follow are planned on it. Raises CompressError children for a family or an amount it cannot
        handle.
        """
        raise NotImplementedError

    def reshape(self, model: Whole, source: Checkpoint) -> Reshaped:
        """The reshaped model, without the parts that matter least; `source` holds the tensors of `model`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Quantizer(WeightPass):
    """A pass that puts weights on a grid of few values and keeps masks; a subclass defines grid and rounding."""

    unfed: ClassVar[str] = "rounded to nearest"
    gives: ClassVar[str] = "quantized"

    inputs: Annotated[
        Literal["full", "int8", "fp8"],
        Field(description="what the layer's input is rounded to, with one scale per token"),
    ] = "full"
    factors: Annotated[bool, Field(description="round low-rank factors too")] = False

    @property
    def takes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Every form except a quantized one; low-rank factors only with `factors`."""
        return "dense", "pruned", "split", "permuted", "rotated", *(("factored",) if self.factors else ())

    def rewrite(self, site: Site) -> Weight:
        """The weight with its dense parts quantized."""
        site.inputs = "" if self.inputs == "full" else self.inputs
        return self.visit(site.weight, site, self.quantize)

    def rewrite_unfed(self, site: Site) -> Weight:
        """The same grid, with every weight rounded to the nearest value."""
        site.inputs = "" if self.inputs == "full" else self.inputs
        return self.visit(site.weight, site, self.round)

    def outline(self, site: Site) -> Weight | None:
        """The result of rounding to nearest on the meta device, which `round` must support."""
        return self.visit(site.weight, site, self.round)

    def visit(self, weight: Weight, site: Site, quantize: Quantize) -> Weight:
        """Quantize the dense parts of an expression; a mask stays outside the grid.

        Low-rank factors are quantized only with `factors`, the right one first. A pass that reads the Gram of the input
        fits a left factor without a mask to the rounded right one before it rounds it.

        Raises UnsupportedWeight for any other expression.
        """
        match weight:
            case Dense(w_OI):
                return quantize(w_OI, None, site)
            case Masked(Dense(w_OI), mask_OI):
                return replace(weight, values=quantize(w_OI.masked_fill(~mask_OI, 0), mask_OI, site))
            case Product(left, Permutation() | Hadamard() | Diagonal() as right):
                return Product(self.visit(left, site.behind(right, left), quantize), right)
            case Product(left, right) if self.factors and plain(left) and plain(right):
                rounded = self.visit_factor(right, site.factors(left.dense(), right.dense())[1])
                if isinstance(left, Dense) and Gram in self.requires and Gram in site.stats and not site.starved:
                    whole_OI, dtype = left.data.float() @ right.dense().float(), left.data.dtype
                    left = Dense(answer(whole_OI, rounded.dense().float(), site.stats[Gram])[0].to(dtype))
                outer = site.factors(left.dense(), rounded.dense())[0]  # it reads what the rounded right factor writes
                return Product(self.visit_factor(left, outer), rounded)
            case Sum(terms) if any(map(self.wants, terms)):
                return Sum(tuple(self.visit(t, site, quantize) if self.wants(t) else t for t in terms))
            case _:
                raise UnsupportedWeight(f"{self.name} cannot quantize {site.name}: it is {weight.describe()}")

    def wants(self, term: Weight) -> bool:
        """Whether a term of a sum is quantized: a plain matrix, masked or not, and with `factors` low-rank factors."""
        match term:
            case Product(left, right) if plain(left) and plain(right):
                return self.factors
            case _:
                return plain(term)

    def visit_factor(self, factor: Weight, site: Site) -> Weight:
        """A low-rank factor, quantized; a mask stays outside the grid."""
        match factor:
            case Masked(Dense(), mask_OI):
                return replace(factor, values=self.round_factor(factor.dense(), mask_OI, site))
            case _:
                return self.round_factor(factor.dense(), None, site)

    def round_factor(self, factor: Tensor, keep: Tensor | None, site: Site) -> Weight:
        """A low-rank factor, quantized, by default to nearest, and 0 where `keep` is False.

        `site` is a site whose weight is this factor.
        """
        return self.round(factor, keep, site)

    def round(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """The values nearest to `w_OI`, which is 0 where `keep_OI` is False; needs no statistics.

        For a matrix on the meta device, returns the same form without values.
        """
        raise NotImplementedError

    def quantize(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """The values chosen for `w_OI`, which is 0 where `keep_OI` is False; by default the nearest."""
        return self.round(w_OI, keep_OI, site)


@dataclass(frozen=True, kw_only=True)
class BlockQuantizer(Quantizer):
    """A quantizer to the fixed values of a format, with one scale for every `block` inputs."""

    block: ClassVar[int]

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError if the blocks do not divide the width."""
        if shape[1] % self.block:
            raise RecipeError(f"{self.name}: {site}: its blocks of {self.block} do not divide its width of {shape[1]}")

    def round_factor(self, factor: Tensor, keep: Tensor | None, site: Site) -> Weight:
        """A factor rounded to nearest; raises UnsupportedWeight if the blocks do not divide its width."""
        if factor.shape[1] % self.block:
            raise UnsupportedWeight(
                f"{self.name}: {site.name}: its blocks of {self.block} do not divide the rank of {factor.shape[1]}; "
                "use another rank, or factors: false"
            )
        return super().round_factor(factor, keep, site)


@dataclass(frozen=True, kw_only=True)
class GridQuantizer(Quantizer):
    """A quantizer to uniform integer grids."""

    shared_out = "bits"

    bits: Annotated[int, Field(ge=2, le=8, description="bits per code")] = 4
    group: Annotated[
        int, Field(ge=-1, description="inputs that share a scale; 0: a whole row, -1: the whole matrix")
    ] = 64
    symmetric: Annotated[bool, Field(description="no stored zero; the grid is centred on code 2**(bits-1)")] = False
    search: Annotated[
        bool | Literal["output"],
        Field(description="shrink each range to minimise |w - w'|**2.4 (true) or the output error (output)"),
    ] = False

    @property
    def requires(self) -> tuple[type[Statistic], ...]:  # type: ignore[override]
        """The Gram, if ranges are searched by output error."""
        return (Gram,) if self.search == "output" else ()

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError if the group does not divide the width, or if `search: output` meets one grid for all."""
        if self.search == "output" and self.group < 0:
            raise RecipeError(f"{self.name}: search: output needs one grid per row or group; group is {self.group}")
        if self.group > 0 and shape[1] % self.group:
            raise RecipeError(f"{self.name}: {site}: group {self.group} does not divide its width of {shape[1]}")

    @property
    def grid(self) -> Grid:
        """The grid defined by the options."""
        return Grid(bits=self.bits, group=self.group, symmetric=self.symmetric)

    def round(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """The nearest codes of `w_OI`; 0 is on every grid. Without statistics, ranges are searched by weight error."""
        return self.grid.quantize(w_OI, search=bool(self.search))

    def round_factor(self, factor: Tensor, keep: Tensor | None, site: Site) -> Weight:
        """A factor rounded to nearest, with one grid per row where the group does not divide its width."""
        fits = self.group > 0 and factor.shape[1] % self.group == 0
        return replace(self.grid, group=self.group if fits else 0).quantize(factor, search=bool(self.search))

    def gram(self, site: Site) -> Tensor | None:
        """The Gram used to search ranges by output error; None if they are not searched that way."""
        return site.stats[Gram] if self.search == "output" else None
