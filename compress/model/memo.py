"""What parts of a block give, kept while the rest of the block is measured.

An input is measured by running the block up to it, so all that lies in front would be computed once more for every
input. When the last weight inside a direct child of the block (its attention, say) is rewritten, what that child gives
no longer changes: it is kept for each batch and handed out until the batch has moved on. Where a child gives what
its last matrix gives and nothing else, what that matrix reads is kept as soon as it was measured: then nothing in front
of it is computed twice.
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
    """The matrix whose output is what a child gives, alone or before so many times None."""

    child: str
    module: nn.Module
    alone: bool
    rest: int

    def __call__(self, x: Tensor) -> Any:
        """What the child gives when its last matrix reads this."""
        out = self.module(x)
        return out if self.alone else (out, *[None] * self.rest)

    def final(self, held: Iterable[tuple[nn.Parameter, Tensor]]) -> bool:
        """Whether its parameters are among those that no longer change."""
        still = {id(parameter) for parameter, _ in held}
        return all(id(parameter) in still for parameter in self.module.parameters())


@dataclass
class Kept:
    """What each call of a child gave in one forward, and the parameters with which it did.

    Or, until its tail is rewritten, what that reads.
    """

    held: list[tuple[nn.Parameter, Tensor]]
    outputs: list[Any] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    read: Tensor | None = None
    read_version: list[int] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """Whether the parameters are the same tensors in memory, whose place no others can have taken meanwhile.

        And nobody wrote over what the tail reads.
        """
        if self.read is not None and versions_of([self.read]) != self.read_version:
            return False
        return all(parameter.data_ptr() == tensor.data_ptr() for parameter, tensor in self.held)


class Memo:
    """The outputs of the children of a block that are done; nothing is kept until `active` is set."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.active = module, False
        self.kept: dict[Key, dict[str, Kept]] = {}
        self.tails: dict[str, Tail] = {}

    def forget(self, batch: int | None = None) -> None:
        """Let go of what is kept of a batch, by default of all."""
        self.kept = {key: found for key, found in self.kept.items() if batch is not None and key[0] != batch}

    def part(self, key: Key) -> None:
        """Let go of what is kept of these windows together with others: memory did not suffice for so many."""
        batch, start, stop = key
        wider = [k for k in self.kept if k[0] == batch and k != key and k[1] <= start and stop <= k[2]]
        for each in wider:
            del self.kept[each]

    @contextmanager
    def used(self, key: Key, done: Iterable[str], changing: Iterable[nn.Parameter]) -> Iterator[None]:
        """Run the block on these windows while its children hand out what was kept; of those `done`, keep it.

        It is computed again if a parameter has changed that was not among the `changing` when it was kept.
        """
        held = self._held(changing)
        found = {name: kept for name, kept in self.kept.pop(key, {}).items() if kept.valid}
        for name, kept in [(name, kept) for name, kept in found.items() if kept.read is not None]:
            if self.tails[name].final(held):
                kept.held = held  # its tail is among them now
            else:
                del found[name]
        if self.active:
            found |= {name: Kept(held) for name in done if name not in found}
        with ExitStack() as stack:
            for name, kept in found.items():
                stack.enter_context(self._handing_out(name, kept))
            yield
        if any(versions_of(kept.outputs) != kept.versions for kept in found.values()):
            self.active = False  # somebody writes over what a child gave
            self.forget()
        elif self.active:
            reached = {name: kept for name, kept in found.items() if kept.outputs or kept.read is not None}
            self.kept[key] = reached

    def keep_read(self, key: Key, tail: Tail, x: Tensor, changing: Iterable[nn.Parameter]) -> None:
        """Keep what the tail of a child reads of these windows."""
        if self.active:
            x = lasting(x)
            self.kept.setdefault(key, {})[tail.child] = Kept(
                self._held(changing), read=x, read_version=versions_of([x])
            )

    def _held(self, changing: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters that no longer change, with their tensors."""
        still = {id(parameter) for parameter in changing}
        return [(p, p.data) for p in self.module.parameters() if id(p) not in still]

    @contextmanager
    def watched(self, matrices: Mapping[str, Iterable[nn.Module]]) -> Iterator[None]:
        """Find the tails of children, given the matrices in each that nobody else hooks, while the block runs once."""
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
        """The child gives what it gave, if it did, else what it gives is kept."""
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
    """What a child gave, its tensors apart from what forwards make and drop."""
    if type(output) is tuple:
        return tuple(all_lasting(value) for value in output)
    return lasting(output) if isinstance(output, Tensor) else output


def versions_of(outputs: Iterable[Any]) -> list[int]:
    """How often the tensors of outputs were written to."""
    found: list[int] = []
    for output in outputs:
        if isinstance(output, Tensor) and not output.is_inference():
            found.append(output._version)
        elif isinstance(output, tuple):
            found += versions_of(output)
    return found
