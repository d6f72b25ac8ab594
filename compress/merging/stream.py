"""Merges tensor by tensor; memory holds one tensor of each model (memory-mapped), the merged one and parts in float64.

Where the merged change equals one model's change exactly, that model's own value is written rather than W0 + (W - W0),
which may round. A model merged alone without dropping anything is therefore reproduced bit for bit in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from compress.errors import ArtifactError
from compress.merging.inputs import Inputs, Member, checked
from compress.merging.method import Change, Method, parts
from compress.merging.shares import Share
from compress.shards import Entry
from compress.stats import finite

Make = Callable[[str], Tensor]


class Stream:
    """Makes the merged tensors by name; `tally` counts, by model, the entries it changed and those of them kept."""

    def __init__(self, inputs: Inputs, method: Method, shares: Mapping[str, Share]) -> None:
        self.inputs, self.method, self.shares = inputs, method, shares
        self.tally = {member.label: [0, 0] for member in inputs.members}
        self.names = [name for name in inputs.names() if inputs.merges(name)]
        size = sum(prod(inputs.base.headers[name].shape) for name in self.names)
        self.known = method.survey({m.key: partial(self.magnitudes, m) for m in inputs.members}, size)

    def magnitudes(self, member: Member) -> Iterator[Tensor]:
        """|D| over all tensors of a model, in parts."""
        for name in self.names:
            yield from self.change(member, name, checked(self.inputs.base, name)).magnitudes()

    def change(self, member: Member, name: str, base: Tensor) -> Change:
        """The change that a model made to a tensor, without the rows that it added."""
        own = member.tensor(name)
        own = own[: len(base)] if base.ndim else own
        return Change(name=name, model=member.key, base_RN=as_matrix(base), own_RN=as_matrix(own))

    def weights(self, name: str) -> dict[str, float]:
        """Label -> weight in a tensor, for the models whose weight is not 0, in the order of their keys."""
        found = {member.label: self.shares[member.label].of(name) for member in self.inputs.members}
        return {label: weight for label, weight in found.items() if weight}

    def tensor(self, name: str) -> Tensor:
        """The merged tensor, in the base's dtype; raises ArtifactError if it is not finite."""
        base = checked(self.inputs.base, name)
        weights = self.weights(name)
        if not self.inputs.merges(name) or not base.numel() or not weights:
            return self.with_new_rows(name, base)
        changes = [self.change(m, name, base) for m in self.inputs.members if m.label in weights]
        merged = self.fused(changes, list(weights), list(weights.values()))
        return self.with_new_rows(name, finite_in(merged.view(base.shape), base.dtype, name))

    def fused(self, changes: Sequence[Change], labels: Sequence[str], weights: Sequence[float]) -> Tensor:
        """The merged tensor [R, N], computed part by part."""
        base_RN = changes[0].base_RN
        merged_RN = torch.empty_like(base_RN)
        sieves = [self.method.sieve(change, self.known.get(change.model)) for change in changes]
        for rows in parts(base_RN):
            whole = [change.part(rows) for change in changes]
            kept = [sieve(part) for sieve, part in zip(sieves, whole, strict=True)]
            for label, before, after in zip(labels, whole, kept, strict=True):
                self.count(label, before, after)
            moved = self.method.fuse(kept, weights)
            values = base_RN[rows].double() + moved
            for change, before in zip(changes, whole, strict=True):
                values = torch.where(moved == before, change.own_RN[rows].double(), values)
            merged_RN[rows] = values.to(merged_RN.dtype)
        return merged_RN

    def count(self, label: str, change: Tensor, kept: Tensor) -> None:
        """Add the non-zero entries of a change, before and after thinning, to the tally of a model."""
        self.tally[label][0] += int(change.count_nonzero())
        self.tally[label][1] += int(kept.count_nonzero())

    def with_new_rows(self, name: str, merged: Tensor) -> Tensor:
        """A merged table followed by the rows that models added to it, or by their mean if several did."""
        more = [m for m in self.inputs.growers if m.source.headers[name].shape != merged.shape]
        if not more:
            return merged
        added = torch.stack([m.tensor(name)[len(merged) :].double() for m in more]).mean(0)
        return torch.cat((merged, finite_in(added.to(merged.dtype), merged.dtype, name)))

    def entries(self, names: Sequence[str], make: Make | None = None) -> list[Entry]:
        """Entries for the merged tensors, each of which is made when it is written."""
        made = []
        for name in names:
            held = self.inputs.header(name)
            made.append(Entry(name=name, make=partial(make or self.tensor, name), **held._asdict(), nbytes=held.nbytes))
        return made


def as_matrix(tensor: Tensor) -> Tensor:
    """A tensor as a matrix whose rows run along its last dimension."""
    return tensor.reshape(-1, max(1, tensor.shape[-1])) if tensor.ndim else tensor.reshape(1, 1)


def finite_in(merged: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor itself; raises ArtifactError if values were too large for the dtype."""
    if not finite(merged):
        raise ArtifactError(f"{name}: merged values are too large for {dtype}; lower scale or weights")
    return merged
