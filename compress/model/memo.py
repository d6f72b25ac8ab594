"""Caches the outputs of a block's submodules while the remaining inputs of that block are measured.

An input is measured by running the block up to it, so everything before it would be recomputed for every input. Once
the last weight inside a direct child of the block (its attention, for example) has been rewritten, the child's output
no longer changes: it is cached for each batch and returned until the batch has moved on. If a child's output is just
the output of its last matrix (its tail), the input of that matrix is cached as soon as it has been measured, so that
nothing before it is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from compress.model.memory import lasting

Key = tuple[int, int, int]  # number of a batch, first and last of its windows


@dataclass(frozen=True)
class Tail:
    """The matrix whose output is a child's whole output, `alone` or as the first of a tuple with `rest` times None."""

    child: str
    module: nn.Module
    alone: bool
    rest: int

    def __call__(self, x: Tensor) -> Any:
        """The child's output if its last matrix reads `x`."""
        out = self.module(x)
        return out if self.alone else (out, *[None] * self.rest)

    def final(self, held: Iterable[tuple[nn.Parameter, Tensor]]) -> bool:
        """Whether its parameters are among those that no longer change (`held`)."""
        still = {id(parameter) for parameter, _ in held}
        return all(id(parameter) in still for parameter in self.module.parameters())


@dataclass
class Kept:
    """The cached outputs of a child's calls in one forward pass, and the parameters they were computed with.

    Until the child's tail has been rewritten, `read`, the input of that tail, instead.
    """

    held: list[tuple[nn.Parameter, Tensor]]
    outputs: list[Any] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    read: Tensor | None = None
    read_version: list[int] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """Whether the parameters still have the same memory, and the cached input was not modified in place.

        Comparing addresses is safe, because `held` keeps the tensors alive, so nothing else can take their place.
        """
        if self.read is not None and versions_of([self.read]) != self.read_version:
            return False
        return all(parameter.data_ptr() == tensor.data_ptr() for parameter, tensor in self.held)


class Memo:
    """The cached outputs of those children of a block that no longer change; caches nothing until `active` is set."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.active = module, False
        self.kept: dict[Key, dict[str, Kept]] = {}
        self.tails: dict[str, Tail] = {}

    def forget(self, batch: int | None = None) -> None:
        """Free what is cached of a batch, by default of all batches."""
        self.kept = {key: found for key, found in self.kept.items() if batch is not None and key[0] != batch}

    def part(self, key: Key) -> None:
        """Free what is cached of wider parts that include these windows, after memory ran out for so many."""
        batch, start, stop = key
        wider = [k for k in self.kept if k[0] == batch and k != key and k[1] <= start and stop <= k[2]]
        for each in wider:
            del self.kept[each]

    @contextmanager
    def used(self, key: Key, done: Iterable[str], changing: Iterable[nn.Parameter]) -> Iterator[None]:
        """Inside, children return cached outputs for these windows; outputs of the children `done` are cached.

        An output is recomputed if a parameter has changed that was not among the `changing` when it was cached.
        """
        held = self._held(changing)
        found = {name: kept for name, kept in self.kept.pop(key, {}).items() if kept.valid}
        for name, kept in [(name, kept) for name, kept in found.items() if kept.read is not None]:
            if self.tails[name].final(held):
                kept.held = held  # now includes the tail's parameters
            else:
                del found[name]
        if self.active:
            found |= {name: Kept(held) for name in done if name not in found}
        with ExitStack() as stack:
            for name, kept in found.items():
                stack.enter_context(self._handing_out(name, kept))
            yield
        if any(versions_of(kept.outputs) != kept.versions for kept in found.values()):
            self.active = False  # the block modifies a child's output in place
            self.forget()
        elif self.active:
            reached = {name: kept for name, kept in found.items() if kept.outputs or kept.read is not None}
            self.kept[key] = reached

    def keep_read(self, key: Key, tail: Tail, x: Tensor, changing: Iterable[nn.Parameter]) -> None:
        """Cache the input `x` of a child's tail for these windows, if caching is active."""
        if self.active:
            x = lasting(x)
            self.kept.setdefault(key, {})[tail.child] = Kept(
                self._held(changing), read=x, read_version=versions_of([x])
            )

    def _held(self, changing: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters of the block that no longer change, with their tensors."""
        still = {id(parameter) for parameter in changing}
        return [(p, p.data) for p in self.module.parameters() if id(p) not in still]

    @contextmanager
    def watched(self, matrices: Mapping[str, Iterable[nn.Module]]) -> Iterator[None]:
        """Inside, find the children's tails while the block runs once, among the unhooked `matrices` of each child."""
        last: dict[str, tuple[nn.Module, Any, list[int]]] = {}
        calls: dict[nn.Module, int] = {}

        def seen(child: str, inside: bool, module: nn.Module, args: Any, out: Any) -> None:
            calls[module] = calls.get(module, 0) + 1
            if inside:
                last[child] = module, out, versions_of([out])
                return
            first, *rest = out if type(out) is tuple and out else (out,)
            matrix, given, version = last.get(child, (module, None, []))
            same = isinstance(first, Tensor) and first is given and versions_of([first]) == version != []
            if same and calls[module] == calls[matrix] == 1 and all(value is None for value in rest):
                self.tails[child] = Tail(child, matrix, not isinstance(out, tuple), len(rest))
            else:
                self.tails.pop(child, None)

        with ExitStack() as stack:
            for child, inside in ((child, list(inside)) for child, inside in matrices.items()):
                if not inside:
                    continue
                for module in inside:
                    stack.callback(module.register_forward_hook(partial(seen, child, True)).remove)
                whole = self.module.get_submodule(child)
                stack.callback(whole.register_forward_hook(partial(seen, child, False)).remove)
            yield

    @contextmanager
    def _handing_out(self, name: str, kept: Kept) -> Iterator[None]:
        """Inside, the child returns its cached outputs if there are any; otherwise its outputs are cached."""
        child, known = self.module.get_submodule(name), iter(tuple(kept.outputs))
        fresh, before, forward = not kept.outputs, child.__dict__.get("forward"), child.forward

        def give(*args: Any, **kwargs: Any) -> Any:
            if not fresh:
                return next(known)
            read, kept.read = kept.read, None
            given = forward(*args, **kwargs) if read is None else self.tails[name](read)
            kept.outputs.append(all_lasting(given))
            kept.versions = versions_of(kept.outputs)
            return kept.outputs[-1]

        child.forward = give
        try:
            yield
        finally:
            del child.forward
            if before is not None:
                child.forward = before


def all_lasting(output: Any) -> Any:
    """A child's output, with its tensors moved out of the heap of short-lived allocations."""
    if type(output) is tuple:
        return tuple(all_lasting(value) for value in output)
    return lasting(output) if isinstance(output, Tensor) else output


def versions_of(outputs: Iterable[Any]) -> list[int]:
    """How often each tensor in the outputs was written to; tensors of inference mode are left out."""
    found: list[int] = []
    for output in outputs:
        if isinstance(output, Tensor) and not output.is_inference():
            found.append(output._version)
        elif isinstance(output, tuple):
            found += versions_of(output)
    return found
