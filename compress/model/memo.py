"""What parts of a block give, kept while the rest of the block is measured.

An input is measured by running the block up to it, so all that lies in front would be computed once more for every
input. When the last weight inside a direct child of the block (its attention, say) is rewritten, what that child gives
no longer changes: it is kept for each batch and handed out until the batch has moved on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Key = tuple[int, int, int]  # number of a batch, first and last of its windows


@dataclass
class Kept:
    """What each call of a child gave in one forward, and the parameters with which it did."""

    held: list[tuple[nn.Parameter, Tensor]]
    outputs: list[Any] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """Whether the parameters are the same tensors in memory, whose place no others can have taken meanwhile."""
        return all(parameter.data_ptr() == tensor.data_ptr() for parameter, tensor in self.held)


class Memo:
    """The outputs of the children of a block that are done; nothing is kept until `active` is set."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.active = module, False
        self.kept: dict[Key, dict[str, Kept]] = {}

    def forget(self, batch: int | None = None) -> None:
        """Let go of what is kept of a batch, by default of all."""
        self.kept = {key: found for key, found in self.kept.items() if batch is not None and key[0] != batch}

    @contextmanager
    def used(self, key: Key, done: Iterable[str], changing: Iterable[nn.Parameter]) -> Iterator[None]:
        """Run the block on these windows while its children hand out what was kept; of those `done`, keep it.

        It is computed again if a parameter has changed that was not among the `changing` when it was kept.
        """
        found = self.kept.pop(key, {})
        found = {name: kept for name, kept in found.items() if kept.valid}
        if self.active:
            still = {id(parameter) for parameter in changing}
            held = [(p, p.data) for p in self.module.parameters() if id(p) not in still]
            found |= {name: Kept(held) for name in done if name not in found}
        with ExitStack() as stack:
            for name, kept in found.items():
                stack.enter_context(self._handing_out(name, kept))
            yield
        if any(versions_of(kept.outputs) != kept.versions for kept in found.values()):
            self.active = False  # somebody writes over what a child gave
            self.forget()
        elif self.active:
            self.kept[key] = {name: kept for name, kept in found.items() if kept.outputs}  # not if it was not reached

    @contextmanager
    def _handing_out(self, name: str, kept: Kept) -> Iterator[None]:
        """The child gives what it gave, if it did, else what it gives is kept."""
        child, known = self.module.get_submodule(name), iter(tuple(kept.outputs))
        fresh, before, forward = not kept.outputs, child.__dict__.get("forward"), child.forward

        def give(*args: Any, **kwargs: Any) -> Any:
            if not fresh:
                return next(known)
            kept.outputs.append(forward(*args, **kwargs))
            kept.versions = versions_of(kept.outputs)
            return kept.outputs[-1]

        child.forward = give
        try:
            yield
        finally:
            del child.forward
            if before is not None:
                child.forward = before


def versions_of(outputs: Iterable[Any]) -> list[int]:
    """How often the tensors of outputs were written to."""
    found: list[int] = []
    for output in outputs:
        if isinstance(output, Tensor) and not output.is_inference():
            found.append(output._version)
        elif isinstance(output, tuple):
            found += versions_of(output)
    return found
