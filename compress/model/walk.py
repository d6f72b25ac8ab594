"""The walk: it takes calibration tokens through a model with one block in memory at a time.

A model is built without weights. Its frame (embedding, final norm, head) is loaded when it is needed; blocks are
loaded and dropped one by one. The arguments of each block (masks, rotary tables, position ids) are recorded by running
the model with its blocks replaced by recorders, so nothing about a family's signature is assumed.
Shape suffixes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress.errors import ArtifactError, UnsupportedWeight
from compress.model.anatomy import Anatomy
from compress.model.architecture import check_sizes, run, skeleton
from compress.model.block import Block
from compress.model.layout import Shape
from compress.model.memory import give_back
from compress.model.source import Checkpoint
from compress.model.travellers import Call, Fit, Shared, Travellers
from compress.team import ALONE, Team
from compress.weights import External
from compress.weights.leaves import BASE as BASE

REPLAYED = 2e-2  # relative error; a replay computes the same products, so even bf16 stays far below this


class Source(Protocol):
    """A source of a model's plain tensors, by name."""

    def shapes(self) -> dict[str, Shape]:
        """The shape of every tensor, by name."""

    def tensor(self, name: str) -> Tensor:
        """One tensor."""


class Walk:
    """A model whose blocks are visited in order by batches of tokens; `store` is a folder for hidden states."""

    live = False  # whether the model stays in memory, including its rewritten weights
    base: Source | None = None  # the model that this one was fine-tuned from, if only the differences are rewritten

    def __init__(
        self,
        config: dict[str, Any],
        source: Source,
        dtype: torch.dtype,
        device: torch.device,
        store: Path | None = None,
    ) -> None:
        self.source, self.device, self.dtype, self.store = source, device, dtype, store
        check_sizes(config, source.shapes())
        self._look_at(skeleton(config, dtype), source.shapes())
        self.kept_wide = [name.replace("*", ".*") for name in self.model._get_dtype_plan(dtype)]  # always float32
        self.framed = False

    def _look_at(self, model: Any, shapes: dict[str, Shape] | None) -> None:
        """Find the blocks and sites of a model."""
        self.model: Any = model
        self.anatomy = Anatomy(model, shapes)
        self.path, self.blocks = self.anatomy.path, self.anatomy.blocks
        self.shared, self.fit = Shared(), Fit()
        self.entered = 0
        self.rest: int | None = None  # number of values a block returns after the hidden state; -1 if it is no tuple

    # -- loading -----------------------------------------------------------------------------------

    def load_frame(self) -> None:
        """Load the frame: everything between token ids and logits that is not in a block, unless it is loaded.

        Raises ArtifactError if the checkpoint lacks a parameter, UnsupportedWeight for a buffer without values.
        """
        if self.framed:
            return
        anatomy = self.anatomy
        names = [n for n in anatomy.layout.wanted if not anatomy.in_block(n) and anatomy.in_language(n)]
        self.assign(self.model, anatomy.layout.state([n for n in names if n not in anatomy.layout.tied], self.tensor))
        self.model.tie_weights()
        for name, parameter in self.model.named_parameters():
            if name in names and parameter.is_meta:
                raise ArtifactError(f"the checkpoint lacks {name!r}")
        for module_name, module in self.model.named_modules():
            if not anatomy.in_block(f"{module_name}.") and anatomy.in_language(f"{module_name}."):
                for name, buffer in list(module.named_buffers(recurse=False)):
                    if buffer.is_meta:
                        raise UnsupportedWeight(f"{module_name}.{name} is a buffer that Compress cannot fill")
                    module._buffers[name] = buffer.to(self.device)
        self.framed = True

    def drop_frame(self) -> None:
        """Free what `load_frame` loaded; it is not needed between `enter` and `leave`, and is loaded again if it is."""
        if not self.framed:
            return
        self.framed = False
        for name, module in self.model.named_modules():
            if not self.anatomy.in_block(f"{name}."):
                forget(module)
        give_back()

    def assign(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        """Give a module its tensors, without copying; raises ArtifactError if a shape differs."""
        try:
            module.load_state_dict(state, assign=True, strict=False)
        except RuntimeError as error:
            raise ArtifactError(f"the checkpoint does not fit the architecture: {first_mismatch(error)}") from error

    def tensor(self, name: str, parameter: str, source: Source | None = None) -> Tensor:
        """One tensor on the device; a float is cast to the dtype in which transformers loads this parameter."""
        found = (source or self.source).tensor(name)
        if not found.is_floating_point():
            return found.to(self.device)
        wide = any(re.search(part, parameter) for part in self.kept_wide)
        return found.to(self.device, torch.float32 if wide else self.anatomy.layout.dtypes[parameter])

    def load_block(self, index: int) -> None:
        """Load one block's tensors onto the device; raises ArtifactError if one is missing or has another shape."""
        block, prefix = self.blocks[index], f"{self.path}.{index}."
        self.look_ahead(index + 1)
        state = self.anatomy.layout.state(self.anatomy.parameters_of(index), self.tensor)
        self.assign(block, {name.removeprefix(prefix): t for name, t in state.items()})
        for name, parameter in block.named_parameters():
            if parameter.is_meta:
                raise ArtifactError(f"the checkpoint lacks {prefix}{name}")
        for module in block.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        block.requires_grad_(False)

    def look_ahead(self, index: int) -> None:
        """Ask the system to read the tensors of a block ahead, while the block before it is in use."""
        if index < len(self.blocks):
            for source in (self.source, self.base):
                if isinstance(source, Checkpoint):
                    source.ahead(self.anatomy.tensors_of(index))

    def base_of(self, index: int) -> dict[str, External] | None:
        """The base model's matrix [out, in] of each site of a block, on the device; None without a base."""
        if self.base is None:
            return None
        places = self.anatomy.of_block(index)
        held = [f"{place.module}.{place.parameter}" for place in places]
        state = self.anatomy.layout.state(held, partial(self.tensor, source=self.base))
        matrices = {place: place.within(state[name]) for place, name in zip(places, held, strict=True)}
        return {place.site: External(w_OI.contiguous(), BASE, place.tensor) for place, w_OI in matrices.items()}

    def drop_block(self, index: int) -> None:
        """Free one block's parameters; buffers stay, because some are in no file."""
        for module in self.blocks[index].modules():
            forget(module)
        give_back()

    # -- walking -----------------------------------------------------------------------------------

    @contextmanager
    def replaced(self, stubs: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """Inside, the forward of each block is replaced by its stub."""
        for block, stub in zip(self.blocks, stubs, strict=True):
            block.forward = stub
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def enter(self, ids_BT: Tensor, *, stored: bool = False) -> Travellers:
        """A batch at the first block: its hidden state there, and the arguments of every block.

        With `stored`, the hidden state is kept in the walk's folder, if it has one.
        """
        hidden_BTD, calls = self.record(ids_BT)
        self.entered += 1
        store = self.store / f"batch-{self.entered}" if stored and self.store is not None else None
        return Travellers(ids_BT, hidden_BTD, calls, store, self.fit, self.calls)

    def calls(self, ids_BT: Tensor) -> list[Call]:
        """The arguments of each block for these tokens; the frame is loaded only for this, unless it is in memory."""
        framed = self.framed
        calls = self.record(ids_BT)[1]
        if not framed:
            self.drop_frame()
        return calls

    def record(self, ids_BT: Tensor) -> tuple[Tensor, list[Call]]:
        """The hidden state before the first block, and the arguments of each block.

        Raises UnsupportedWeight for a model that does not call every block.
        """
        if self.rest is None and len(ids_BT) > 1:
            self.record(ids_BT[:1])  # `wrapped` runs the first block to set `rest`: one window fits if any batch does
        self.load_frame()
        calls: list[Call] = [((), {})] * len(self.blocks)
        called: set[int] = set()
        first: list[Tensor] = []

        def recorder(index: int) -> Callable[..., Any]:
            def record(hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
                if index == 0:
                    first.append(hidden_BTD)
                called.add(index)
                calls[index] = self.shared.call((args, kwargs))
                return self.wrapped(hidden_BTD, args, kwargs)

            return record

        with self.replaced([recorder(i) for i in range(len(self.blocks))]):
            run(self.model.base_model, ids_BT.to(self.device))  # without the head
        if not first or len(called) < len(self.blocks):
            missing = next(i for i in range(len(self.blocks)) if i not in called)
            raise UnsupportedWeight(f"{self.path}.{missing} is not called for plain text; it cannot be calibrated")
        return first[0], calls

    def leave(self, travellers: Travellers) -> Tensor:
        """The logits [B, T, vocabulary] after the last block; hidden states if the model has no head."""

        def last(*_: Any, **__: Any) -> Any:
            return self.wrapped(travellers.hidden_BTD, (), {})

        self.load_frame()
        with self.replaced([last] * len(self.blocks)):
            out = run(self.model, travellers.ids_BT.to(self.device))
        return torch.as_tensor(out.logits if hasattr(out, "logits") else out.last_hidden_state)

    def wrapped(self, hidden_BTD: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hidden state in the form in which this model's blocks return it: alone, or first in a tuple.

        The form is found once, by running the first block, because a caller that indexes the result would drop the
        batch dimension of a bare tensor.
        """
        if self.rest is None:
            self.load_block(0)
            forward = type(self.blocks[0]).forward
            out = forward(self.blocks[0], hidden_BTD, *args, **kwargs)
            self.rest = len(out) - 1 if isinstance(out, (tuple, list)) else -1
            self.drop_block(0)
        return hidden_BTD if self.rest < 0 else (hidden_BTD, *[None] * self.rest)

    def visit(
        self,
        batches: list[Travellers],
        probe: Travellers,
        dense: Travellers | None = None,
        twins: Sequence[Travellers] = (),
        done: int = 0,
        team: Team = ALONE,
    ) -> Iterator[Block]:
        """The blocks in order after the first `done`, each loaded before and dropped after its turn.

        The caller must call a block's `advance` before asking for the next one. `dense` is a second copy of the probe
        that stays in the dense model; it has calls of its own, because blocks of some families store in their arguments
        what later blocks read. `twins` are second copies of the batches, which stay dense too. In a `team`, each
        process has its own batches, and all have the probe and `dense`. At the end, sets `dense_logits`.
        """
        dense = self.enter(probe.ids_BT) if dense is None else dense
        for index, module in list(enumerate(self.blocks))[done:]:
            self.load_block(index)
            places, last = self.anatomy.of_block(index), index == len(self.blocks) - 1
            base, name = self.base_of(index), f"{self.path}.{index}"
            block = Block(name, index, module, places, batches, probe, dense, last, twins, self.live, base, team)
            yield block
            block.close()
            self.drop_block(index)
        self.dense_logits = self.leave(dense)

    def replay(self, probe: Travellers, kept: Sequence[int] | None = None) -> Tensor:
        """The logits of the source's model on the probe, one block in memory at a time; of `kept` blocks if given."""
        for index in range(len(self.blocks)) if kept is None else kept:
            self.load_block(index)
            probe.hidden_BTD = probe.through(self.blocks[index], index)
            self.drop_block(index)
        return self.leave(probe)

    def prove(self, ids_BT: Tensor) -> None:
        """Run the model itself, loading its blocks one by one, and compare the output of each with its replay.

        Raises UnsupportedWeight at the first block whose replay, called with the recorded arguments, differs: for
        example one that reads state left by another block. Costs one read of the checkpoint.
        """
        travellers = self.enter(ids_BT)

        def checked(index: int) -> Callable[..., Any]:
            def forward(hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
                self.load_block(index)
                block = self.blocks[index]
                out = type(block).forward(block, hidden_BTD, *args, **kwargs)
                real = out[0] if isinstance(out, (tuple, list)) else out
                stub = block.__dict__.pop("forward")
                replayed = travellers.through(block, index)
                block.forward = stub
                error = float((replayed.float() - real.float()).norm() / real.float().norm().clamp(min=1e-30))
                if not error <= REPLAYED:
                    raise UnsupportedWeight(
                        f"{self.path}.{index}: called alone, its output differs by {error:.2g}; "
                        f"{type(self.model).__name__} cannot be walked block by block"
                    )
                travellers.hidden_BTD = replayed
                self.drop_block(index)
                return out

            return forward

        with self.replaced([checked(i) for i in range(len(self.blocks))]):
            run(self.model.base_model, ids_BT.to(self.device))


class LiveWalk(Walk):
    """A walk over a model that is already in memory, whose blocks are neither loaded nor dropped."""

    live = True

    def __init__(self, model: Any) -> None:
        self.device, self.store, self.framed = next(model.parameters()).device, None, True
        self._look_at(model, None)

    def load_frame(self) -> None:
        """Do nothing: the frame is in memory."""

    def drop_frame(self) -> None:
        """Do nothing: the frame stays in memory."""

    def load_block(self, index: int) -> None:
        """Do nothing: the block is in memory."""

    def drop_block(self, index: int) -> None:
        """Do nothing: the block stays in memory."""


def forget(module: nn.Module) -> None:
    """Free a module's own parameters by moving them to the meta device."""
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)


def first_mismatch(error: RuntimeError) -> str:
    """The first mismatch that `load_state_dict` reports, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[min(1, len(lines) - 1)]
