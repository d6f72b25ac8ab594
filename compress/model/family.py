"""Where a model's blocks and sites are, found by structure; and how much of the model that covers.

A block is an element of the one module list that is as long as the config says; a site is an `nn.Linear` inside a
block, or GPT-2's `Conv1D`, which computes the same from a transposed weight. `TESTED` lists the families whose replay,
coverage and round trip this project's tests check; others are walked by the same rule and guarded by the coverage
limit and the final verification.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from compress.errors import UnsupportedWeight

TESTED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "opt", "gpt2", "gptj",
    "falcon", "bloom", "olmo", "olmo2", "olmo3", "stablelm", "starcoder2", "cohere", "granite", "smollm3",
)  # fmt: skip


def find_blocks(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """The name and list of the decoder blocks.

    Raises UnsupportedWeight if there is no module list of `count` elements.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise UnsupportedWeight(f"no list of {count} blocks in {type(model).__name__}; it is not supported")
    return max(found, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map we can stand for."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear map keeps its weight as [in, out]: transformers' `Conv1D`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linear maps of a block by their name inside it."""
    return {name: module for name, module in block.named_modules() if is_linear(module)}


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Which parameters the passes will touch; (parameters, reason) for each tensor they will not.

    `missed` counts the matrices inside blocks that no pass can reach; what a recipe deselects by `sites`,
    embeddings, heads and norms are listed but not missed.
    """

    touched: dict[str, int]
    untouched: dict[str, tuple[int, str]]
    missed: int

    @property
    def missed_share(self) -> float:
        """Parameters of unreachable block matrices / parameters of all block matrices that were meant."""
        meant = self.missed + sum(self.touched.values())
        return self.missed / meant if meant else 0.0

    def reasons(self) -> dict[str, int]:
        """Untouched parameters by reason."""
        return by_reason(self.untouched.values())


def by_reason(untouched: Iterable[Sequence[Any]]) -> dict[str, int]:
    """Parameters by reason, from (parameters, reason) pairs."""
    total: dict[str, int] = {}
    for size, reason in untouched:
        total[reason] = total.get(reason, 0) + size
    return total


MISSED = "a matrix that no pass can reach"


def coverage(model: Any, blocks: str, selections: Iterable[str]) -> Coverage:
    """The coverage of passes with the `sites` globs `selections` over a (meta) model."""
    globs = tuple(selections)
    linears = {f"{name}.weight": name for name, m in model.named_modules() if is_linear(m)}
    head = model.get_output_embeddings()
    touched: dict[str, int] = {}
    untouched: dict[str, tuple[int, str]] = {}
    missed = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        if parameter.ndim < 2:
            untouched[name] = (size, "a vector: norm or bias")
        elif not name.startswith(f"{blocks}."):
            is_head = head is not None and parameter is getattr(head, "weight", None)
            untouched[name] = (size, "the output head, or an embedding tied to it" if is_head else "an embedding")
        elif name not in linears:
            untouched[name] = (size, MISSED)
            missed += size
        elif any(fnmatchcase(linears[name], glob) for glob in globs):
            touched[name] = size
        else:
            untouched[name] = (size, "deselected by the recipe")
    return Coverage(touched=touched, untouched=untouched, missed=missed)
