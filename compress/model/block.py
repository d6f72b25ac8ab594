"""A block in memory: its sites in dataflow order, and the tokens that walk through it.

A site's input depends only on the sites before it, so statistics are gathered per distinct input, by
re-running the block up to that input with the weights rewritten so far: none is stale, none is taken twice.
Shape suffixes: B batch, T tokens, D hidden, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CalibrationError
from compress.model.family import find_linears
from compress.model.site import Site
from compress.stats import Collector, Statistic

BATCH_TOKENS = 4096  # a forward: large enough for GEMM speed, small enough for memory


def batched(ids_NT: Tensor) -> list[Tensor]:
    """Token windows [N, T] in batches of about BATCH_TOKENS tokens."""
    return list(ids_NT.split(max(1, BATCH_TOKENS // ids_NT.shape[1]))) if len(ids_NT) else []


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one input of a linear map, however it was passed."""
    return torch.as_tensor(args[0] if args else next(iter(kwargs.values())))


class Stop(Exception):
    """Ends a forward once what was wanted has been seen."""


class Travellers:
    """A batch of token windows on its way: its hidden state, and what each block is called with."""

    def __init__(self, ids_BT: Tensor, hidden_BTD: Tensor, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        self.ids_BT, self.hidden_BTD, self.calls = ids_BT, hidden_BTD, calls

    def through(self, module: nn.Module, index: int, hidden_BTD: Tensor | None = None) -> Tensor:
        """The output [B, T, D] of block `index` on `hidden_BTD`, by default the present state."""
        args, kwargs = self.calls[index]
        out = module(self.hidden_BTD if hidden_BTD is None else hidden_BTD, *args, **kwargs)
        return torch.as_tensor(out[0] if isinstance(out, tuple) else out)  # a tuple before transformers 4.57


class Block:
    """One block with its sites; `drift` is the probe's relative distance from the dense model after `advance`."""

    def __init__(
        self,
        name: str,
        index: int,
        module: nn.Module,
        batches: Sequence[Travellers],
        probe: Travellers,
        dense_probe: Tensor,
        last: bool = False,
    ) -> None:
        self.last = last
        self.name, self.index, self.module = name, index, module
        self.batches, self.probe, self.dense_probe = batches, probe, dense_probe
        self.drift = 0.0
        self.sites = {site: Site(f"{name}.{site}", linear) for site, linear in find_linears(module).items()}
        self.groups = self._groups()

    def _groups(self) -> list[list[Site]]:
        """Sites that read the very same tensor, in the order the forward reaches them."""
        seen: list[tuple[Tensor, list[Site]]] = []

        def watch(site: Site) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                read = input_of(args, kwargs)
                for x, group in seen:
                    if x is read:
                        if site not in group:
                            group.append(site)
                        return
                seen.append((read, [site]))

            return site.module.register_forward_pre_hook(hook, with_kwargs=True)

        hooks = [watch(site) for site in self.sites.values()]
        try:
            self.probe.through(self.module, self.index)
        finally:
            for hook in hooks:
                hook.remove()
        reached = [group for _, group in seen]
        unreached = [[site] for site in self.sites.values() if all(site not in group for group in reached)]
        return reached + unreached

    def collect(self, groups: Sequence[Sequence[Site]], kinds: Iterable[type[Statistic]]) -> None:
        """Measure the inputs of `groups` in one pass over the calibration tokens.

        Raises CalibrationError if tokens are missing, or an input never occurs or is not finite.
        """
        kinds = tuple(kinds)
        leaders = [group[0] for group in groups]
        if not self.batches:
            raise CalibrationError(f"{leaders[0].name}: {kinds[0].__name__} needs calibration data, none was given")
        collectors = {s: Collector(kinds, s.shape[1], s.original.data.device) for s in leaders}
        hooks = [self._listen(site, collectors[site], last=site is leaders[-1]) for site in leaders]
        try:
            for batch in self.batches:
                try:
                    batch.through(self.module, self.index)
                except Stop:
                    continue
        finally:
            for hook in hooks:
                hook.remove()
        for leader, group in zip(leaders, groups, strict=True):
            if not collectors[leader].tokens:
                raise CalibrationError(f"{leader.name}: no calibration token reaches it")
            stats = collectors[leader].finish(leader.name)
            for site in group:
                site.stats = stats

    def _listen(self, site: Site, collector: Collector, last: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            collector.update(input_of(args, kwargs))
            if last:
                raise Stop

        return site.module.register_forward_pre_hook(hook, with_kwargs=True)

    def advance(self) -> None:
        """Move every batch and the probe through the block as it now is.

        Raises CalibrationError if the output is not finite.
        """
        for travellers in (self.probe,) if self.last else (*self.batches, self.probe):  # nothing reads the others then
            travellers.hidden_BTD = travellers.through(self.module, self.index)
        if not bool(torch.isfinite(self.probe.hidden_BTD).all()):
            raise CalibrationError(f"{self.name}: its output is not finite")
        dense = self.dense_probe.float()
        self.drift = float((self.probe.hidden_BTD.float() - dense).norm() / dense.norm())
