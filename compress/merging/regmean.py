"""RegMean: finds the weight whose outputs are closest to each model's on that model's own inputs; the rest is averaged.

The models are walked side by side, each over its own calibration tokens and with one block of each in memory; a merged
block is written before the next is loaded. A site is any linear layer of a block except routed experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration import Tokens, draw
from compress.errors import CalibrationError
from compress.merging.inputs import Inputs, Member, checked
from compress.merging.method import Method, total
from compress.merging.stream import Stream, finite_in
from compress.model.block import Block
from compress.model.site import Site
from compress.model.source import Checkpoint, dtype_of
from compress.model.walk import Walk
from compress.model.whole import Whole
from compress.plan import check_tensors, in_vocabulary, longest_window, tokenizer_of
from compress.recipe import Calibration
from compress.shards import Entry
from compress.stats import Gram

DAMPING = 1e-6  # times the mean of the diagonal; float32 Grams are not positive definite in their last digits


@dataclass(frozen=True, kw_only=True)
class RegMean(Method):
    """W = (sum_k w_k W_k G_k) (sum_k w_k G_k)^-1, where G_k is the mean x xᵀ of model k's inputs.

    The off-diagonal entries of G_k are multiplied by 1 - shrink.

    Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023, eq. 2, and
    section 3.3 for the shrinking, where alpha is 1 - shrink. Deviations: G is a mean, so that models count by their
    weight and not by their number of tokens; 1e-6 times its mean diagonal is added to its diagonal.
    """

    name = "regmean"
    shared = True
    shrink: Annotated[
        float,
        Field(
            ge=0, le=1, allow_inf_nan=False, description="fraction by which the Gram's off-diagonal entries are reduced"
        ),
    ] = 0.1

    def fuse(self, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The weighted mean, for tensors that are not merged by regression."""
        return total(changes, weights).div_(sum(weights))


def regression(
    changes: Sequence[Tensor], grams: Sequence[Tensor], weights: Sequence[float], shrink: float
) -> Tensor | None:
    """The merged change [out, in], float64, of models whose inputs have these Grams [in, in].

    None if the sum of the Grams is not positive definite. A single change is returned as it is.
    """
    if len(changes) == 1:
        return changes[0]
    left_OI, right_II = torch.zeros_like(changes[0]), torch.zeros_like(grams[0], dtype=torch.float64)
    for change_OI, gram_II, weight in zip(changes, grams, weights, strict=True):
        shrunk_II = gram_II.double() * ((1 - shrink) * weight)
        diagonal_I = gram_II.diagonal().double() * weight
        shrunk_II.diagonal().copy_(diagonal_I + DAMPING * diagonal_I.mean().clamp(min=1e-30))
        left_OI.addmm_(change_OI, shrunk_II)
        right_II += shrunk_II
    factor_II, failed = torch.linalg.cholesky_ex(right_II)
    return None if int(failed) else torch.cholesky_solve(left_OI.T, factor_II).T


class SideBySide:
    """Makes the merged tensors block by block while each model is walked over its own calibration tokens."""

    def __init__(
        self,
        inputs: Inputs,
        stream: Stream,
        method: RegMean,
        calibrations: Mapping[str, Calibration],
        device: torch.device,
    ) -> None:
        self.inputs, self.stream, self.method = inputs, stream, method
        for member in inputs.members:  # to name the tensor: a walk would only report that an output is not finite
            for name in inputs.names():
                member.tensor(name)
        self.walks = {m.label: walk_through(m, device) for m in inputs.members}
        self.tokens = {
            m.label: tokens_of(self.walks[m.label], m, inputs.base, calibrations[m.label]) for m in inputs.members
        }
        self.regressed: list[str] = []

    def parts(self) -> Iterator[list[Entry]]:
        """The tensors to write, one block at a time; each must be written before the next is requested."""
        anatomy = next(iter(self.walks.values())).anatomy
        yield self.stream.entries(anatomy.frame())
        wholes = [Whole(w, self.tokens[label].windows, self.tokens[label].probe_NT) for label, w in self.walks.items()]
        for blocks in zip(*(whole.blocks((Gram,)) for whole in wholes), strict=True):
            present = dict(zip(self.walks, blocks, strict=True))
            yield self.stream.entries(anatomy.tensors_of(blocks[0].index), partial(self.merged, blocks=present))

    def facts(self) -> dict[str, Any]:
        """The calibration tokens of each model, and the names of the tensors merged by regression.

        If memory ran out, also the number of windows that the model was then run on at once.
        """
        named: dict[str, Any] = {label: {"name": t.name, "sha256": t.sha256} for label, t in self.tokens.items()}
        for label, walk in self.walks.items():
            if walk.fit.halved:
                named[label]["windows_at_once"] = walk.fit.most
        return {"calibration": named, "regressed": sorted(self.regressed)}

    def merged(self, name: str, blocks: Mapping[str, Block]) -> Tensor:
        """One tensor of a block: by regression if it is a site of which every model has a Gram, averaged otherwise."""
        weights = self.stream.weights(name)
        sites = {label: site_of(blocks[label], name) for label in weights}
        if len(weights) == 1 or not all(site is not None and Gram in site.stats for site in sites.values()):
            return self.stream.tensor(name)
        self.regressed.append(name)
        site, base = next(s for s in sites.values() if s is not None), checked(self.inputs.base, name)
        turned = site.transposed != site.place.turned
        base_OI = base.T.double() if turned else base.double()
        members = [m for m in self.inputs.members if m.label in weights]
        owns = [m.tensor(name).double() for m in members]
        changes = [(own.T if turned else own) - base_OI for own in owns]
        for label, change in zip(weights, changes, strict=True):
            self.stream.count(label, change, change)
        grams = [s.stats[Gram] for s in sites.values() if s is not None]
        there = [change.to(grams[0].device) for change in changes]
        moved_OI = regression(there, grams, list(weights.values()), self.method.shrink)
        if moved_OI is None:
            raise CalibrationError(
                f"{site.name}: the Grams of its inputs are not positive definite; raise shrink or give more samples"
            )
        merged_OI = (base_OI + moved_OI.cpu()).to(base.dtype)
        return finite_in((merged_OI.T if turned else merged_OI).contiguous(), base.dtype, name)


def site_of(block: Block, name: str) -> Site | None:
    """The site whose matrix is the whole tensor of this name in the file and that sees every token, or None."""
    found = [site for site in block.sites.values() if site.place.tensor == name]
    return found[0] if len(found) == 1 and found[0].whole and not found[0].place.routed else None


def walk_through(member: Member, device: torch.device) -> Walk:
    """The walk over a model; raises ArtifactError if its files do not match its config."""
    source = member.source
    walk = Walk(source.config, source, dtype_of(source.config), device)
    check_tensors(walk, source)
    return walk


def tokens_of(walk: Walk, member: Member, base: Checkpoint, calibration: Calibration) -> Tokens:
    """The calibration tokens of a model, from its own tokenizer, or from the base's if it has none, as a delta may.

    Raises CalibrationError if neither tokenizer can be loaded, the data is not available, or a token is outside the
    model's vocabulary.
    """
    tokenizer = tokenizer_of(member.source.path) or tokenizer_of(base.path)
    if tokenizer is None:
        raise CalibrationError(f"{member.label}: there is no tokenizer, and regmean needs one")
    return in_vocabulary(draw(calibration, tokenizer, longest_window(walk)), walk, member.label)
