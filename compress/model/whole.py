"""The whole dense model, for passes that must look at all of it before anything is rewritten.

Its blocks are still loaded and dropped one at a time; only statistics and hidden states stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.model.anatomy import Anatomy
from compress.model.block import Block
from compress.model.globs import matches
from compress.model.travellers import batched, tokens_at_once
from compress.model.walk import Walk
from compress.stats import Statistic


class Whole:
    """A model with the calibration windows [N, T] of a run and its probe windows.

    `passes` are those of the recipe, for passes that depend on what comes after them.
    """

    def __init__(self, walk: Walk, windows: Sequence[Tensor], probe_NT: Tensor, passes: Sequence[Any] = ()) -> None:
        self.walk, self.windows, self.probe_NT, self.passes = walk, tuple(windows), probe_NT, tuple(passes)

    @property
    def config(self) -> Any:
        """The configuration of the language model."""
        return self.walk.model.config.get_text_config()

    @property
    def anatomy(self) -> Anatomy:
        """The parts of the model: its sites, blocks and tensor names."""
        return self.walk.anatomy

    @torch.no_grad()
    def blocks(self, kinds: Iterable[type[Statistic]] = (), sites: str = "*") -> Iterator[Block]:
        """The unchanged blocks in order, with statistics of `kinds` for each distinct input of the selected sites.

        Costs one forward pass over the calibration tokens, and a second one if `kinds` is not empty.
        """
        kinds = tuple(kinds)
        batches = [self.walk.enter(ids, stored=True) for ids in batched(self.windows, tokens_at_once(self.walk.device))]
        probe = self.walk.enter(self.probe_NT)
        try:
            for block in self.walk.visit(batches, probe):
                groups = [group for group in block.groups if any(matches(site.name, sites) for site in group)]
                if kinds and groups:
                    block.collect(groups, kinds)
                yield block
                block.advance()
        finally:
            for batch in batches:
                batch.forget()
