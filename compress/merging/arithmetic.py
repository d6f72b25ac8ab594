"""Sums of changes: task arithmetic, and the plain mean of the models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from compress.merging.method import Method, Scale, total


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Method):
    """W0 + scale * sum_k w_k D_k; a negative weight takes away what a model learnt.

    Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, section 2.
    """

    name = "task-arithmetic"
    signed = True
    scale: Scale = 1.0

    def fuse(self, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The weighted sum."""
        return total(changes, weights).mul_(self.scale)


@dataclass(frozen=True, kw_only=True)
class Average(Method):
    """sum_k w_k W_k / sum_k w_k; `linear` in mergekit.

    Source: Wortsman et al., "Model soups", ICML 2022, section 2, the uniform soup; weights are ours.
    """

    name = "average"
    shared = True

    def fuse(self, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The weighted mean."""
        return total(changes, weights).div_(sum(weights))
