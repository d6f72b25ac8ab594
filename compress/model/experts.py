"""Observing the input of each expert in a stack, without knowing how its family routes tokens.

A stack is one parameter [experts, out, in]; the model multiplies with slices of it. Inside `Products`, every product
whose right operand lies in a watched stack is reported with its expert and its input. This relies on the experts being
run one after the other or as one batched product, which transformers calls the `eager` implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from compress.errors import UnsupportedWeight

PRODUCTS = ("matmul", "__matmul__", "mm", "bmm")
Seen = Callable[[str, int, Tensor], None]  # (stack, expert, x [tokens, in])


class Products(TorchFunctionMode):
    """Reports (stack, expert, x) for each product with a slice of the `stacks`, which have full parameter names.

    `transposed` says which are kept as [experts, in, out]. Raises UnsupportedWeight if a product reads a stack in the
    other orientation.
    """

    def __init__(self, stacks: Mapping[str, Tensor], transposed: Mapping[str, bool], seen: Seen) -> None:
        super().__init__()
        self.stacks = {stack.untyped_storage().data_ptr(): (name, stack) for name, stack in stacks.items()}
        self.transposed, self.seen = transposed, seen

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Report a product with a watched stack, then compute it."""
        name = getattr(func, "__name__", "")
        if (name == "linear" or name in PRODUCTS) and len(args) > 1 and isinstance(args[1], Tensor):
            found = self.stacks.get(args[1].untyped_storage().data_ptr())
            if found is not None:
                self.report(*found, args[0], args[1], plain=name == "linear")
        return func(*args, **(kwargs or {}))

    def report(self, name: str, stack: Tensor, x: Tensor, w: Tensor, plain: bool) -> None:
        """Report one product `x @ w.T` (plain) or `x @ w` with a slice `w` of a stack."""
        straight = w.stride()[-2:] == stack.stride()[-2:]
        if (plain == straight) == self.transposed[name]:
            raise UnsupportedWeight(
                f"{name}: the model reads these experts transposed, compared with what was expected"
            )
        if w.ndim == 3:
            for expert, x_TI in enumerate(x):
                self.seen(name, expert, x_TI[(x_TI != 0).any(-1)])  # rows of zeros stand for other experts' tokens
            return
        self.seen(name, (w.storage_offset() - stack.storage_offset()) // stack.stride(0), x)


@contextmanager
def one_by_one(model: Any) -> Iterator[None]:
    """Inside, a model in memory runs its experts with the `eager` implementation, which can be observed."""
    if not hasattr(model, "get_experts_implementation"):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
