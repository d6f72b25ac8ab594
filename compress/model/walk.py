"""The way of calibration tokens through a model, one block in memory at a time.

A model is built without weights; its embedding, final norm and head are loaded, its blocks come and go.
What each block is called with (masks, rotary tables, position ids) is recorded by running the model with
its blocks replaced by recorders: nothing about a family's signature is assumed.
Shape suffixes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress.errors import ArtifactError, UnsupportedWeight
from compress.model.block import Block, Travellers
from compress.model.family import find_blocks


class Source(Protocol):
    """Something that yields the plain tensors of a model by name."""

    def names(self) -> list[str]:
        """All tensor names."""

    def tensor(self, name: str) -> Tensor:
        """One tensor."""


def skeleton(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model of a config with parameters on the meta device and buffers real.

    Raises ArtifactError for a config transformers does not know.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:  # transformers raises whatever a wrong value happens to break; none of it is a bug of ours
        parsed = AutoConfig.for_model(**plain)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(parsed, dtype=dtype)
    except Exception as error:
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        raise ArtifactError(f"config.json: transformers cannot build this model: {reason}") from error
    if not isinstance(model, nn.Module):
        raise ArtifactError("config.json: not a causal language model")
    return model.eval().requires_grad_(False)


def first_mismatch(error: RuntimeError) -> str:
    """The first complaint of `load_state_dict`, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[min(1, len(lines) - 1)]


class Walk:
    """A model whose blocks are visited in order by batches of tokens."""

    def __init__(self, config: dict[str, Any], source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self._look_at(skeleton(config, dtype))
        self._load_frame()

    def _look_at(self, model: Any) -> None:
        """Find the blocks of a model."""
        self.model: Any = model
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
        self.path, self.blocks = find_blocks(model, layers)
        self.rest: int | None = None  # values a block returns after the hidden state; -1 if it returns no tuple

    def _load_frame(self) -> None:
        """Load everything that is not in a block."""
        self.model.tie_weights()
        tied = set(getattr(self.model, "all_tied_weights_keys", {}) or {})
        wanted = [n for n, p in self.model.named_parameters(remove_duplicate=False) if not self.in_block(n)]
        state = {n: self.tensor(n) for n in wanted if n not in tied}
        try:
            self.model.load_state_dict(state, assign=True, strict=False)
        except RuntimeError as error:
            raise ArtifactError(f"the checkpoint does not fit the architecture: {first_mismatch(error)}") from error
        self.model.tie_weights()
        missing = [n for n, p in self.model.named_parameters() if not self.in_block(n) and p.is_meta]
        if missing:
            raise ArtifactError(f"the checkpoint lacks {missing[0]!r}")
        for module_name, module in self.model.named_modules():
            if not self.in_block(f"{module_name}."):
                for name, buffer in list(module.named_buffers(recurse=False)):
                    if buffer.is_meta:
                        raise UnsupportedWeight(f"{module_name}.{name} is a buffer this program cannot fill")
                    module._buffers[name] = buffer.to(self.device)

    def tensor(self, name: str) -> Tensor:
        """One tensor on the device, floats in the dtype of the config as transformers loads them."""
        found = self.source.tensor(name)
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise ArtifactError(f"{name}: the checkpoint holds NaN or infinite values")
        return found.to(self.device, self.dtype if found.is_floating_point() else found.dtype)

    def in_block(self, name: str) -> bool:
        """Whether a tensor belongs to a block."""
        return name.startswith(f"{self.path}.")

    def load_block(self, index: int) -> None:
        """Bring one block's tensors to the device; tensors the architecture does not know are left in the file.

        Raises ArtifactError if a tensor is missing or has another shape.
        """
        block, prefix = self.blocks[index], f"{self.path}.{index}."
        names = [n for n in self.source.names() if n.startswith(prefix)]
        state = {n.removeprefix(prefix): self.tensor(n) for n in names}
        try:
            missing = block.load_state_dict(state, assign=True, strict=False).missing_keys
        except RuntimeError as error:
            reason = first_mismatch(error)
            raise ArtifactError(f"{prefix[:-1]}: the checkpoint does not fit the architecture: {reason}") from error
        if missing:
            raise ArtifactError(f"the checkpoint lacks {prefix}{missing[0]}")
        block.requires_grad_(False)

    def drop_block(self, index: int) -> None:
        """Forget one block's parameters; buffers stay, some are in no file."""
        for module in self.blocks[index].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)

    @contextmanager
    def replaced(self, stubs: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """Run with the forward of each block replaced."""
        for block, stub in zip(self.blocks, stubs, strict=True):
            block.forward = stub
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def enter(self, ids_BT: Tensor) -> Travellers:
        """The hidden state before the first block, and what each block is called with."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {})] * len(self.blocks)
        first: list[Tensor] = []

        def recorder(index: int) -> Callable[..., Any]:
            def record(hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
                if index == 0:
                    first.append(hidden_BTD)
                calls[index] = (args, kwargs)
                return self.wrapped(hidden_BTD, args, kwargs)

            return record

        with self.replaced([recorder(i) for i in range(len(self.blocks))]):
            self.model.base_model(input_ids=ids_BT.to(self.device), use_cache=False)  # without the head
        return Travellers(ids_BT, first[0], calls)

    def leave(self, travellers: Travellers) -> Tensor:
        """The logits [B, T, vocabulary] after the last block."""

        def last(*_: Any, **__: Any) -> Any:
            return self.wrapped(travellers.hidden_BTD, (), {})

        with self.replaced([last] * len(self.blocks)):
            logits = self.model(input_ids=travellers.ids_BT.to(self.device), use_cache=False).logits
        return torch.as_tensor(logits)

    def wrapped(self, hidden_BTD: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hidden state in the form in which this model's blocks return it: alone, or first of a tuple.

        Learnt once from the first block itself: a caller that indexes a bare tensor would lose its batch dimension.
        """
        if self.rest is None:
            self.load_block(0)
            forward = type(self.blocks[0]).forward
            out = forward(self.blocks[0], hidden_BTD, *args, **kwargs)
            self.rest = len(out) - 1 if isinstance(out, tuple) else -1
            self.drop_block(0)
        return hidden_BTD if self.rest < 0 else (hidden_BTD, *[None] * self.rest)

    def visit(self, batches: list[Travellers], probe: Travellers) -> Iterator[Block]:
        """The blocks in order, each loaded before and dropped after its turn.

        Whoever takes a block calls its `advance` before asking for the next one.
        """
        dense_probe = probe.hidden_BTD
        for index, module in enumerate(self.blocks):
            self.load_block(index)
            dense_probe = probe.through(module, index, dense_probe)
            yield Block(
                f"{self.path}.{index}", index, module, batches, probe, dense_probe, index == len(self.blocks) - 1
            )
            self.drop_block(index)
        self.dense_logits = self.leave(Travellers(probe.ids_BT, dense_probe, probe.calls))


class LiveWalk(Walk):
    """A walk over a model already in memory, whose blocks neither come nor go."""

    def __init__(self, model: Any) -> None:
        self.device = next(model.parameters()).device
        self._look_at(model)

    def load_block(self, index: int) -> None:
        """Nothing: the block is there."""

    def drop_block(self, index: int) -> None:
        """Nothing: the block stays."""
