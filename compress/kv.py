"""The choice of key-value cache in a recipe or in `load`: the options of a quantized cache, or the word `latent`.

Not here: the caches themselves (`runtime/kv.py`, `runtime/latent.py`). A recipe only records the choice; nothing in the
stored weights depends on it, and `load` may choose otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from compress.errors import RecipeError
from compress.options import build, check_options


@dataclass(frozen=True, kw_only=True)
class KV:
    """A quantized cache: keys and values are rounded, except those of the first `sink` and newest `residual` tokens.

    A group of `group` numbers shares a scale and a minimum of 16 bits each, so a rounded number takes
    `bits + 32 / group` bits. Keys are rounded together once `residual` of them have accumulated; values one by one.
    """

    bits: Annotated[Literal[8, 4, 2], Field(description="bits of a rounded key or value")] = 4
    group: Annotated[int, Field(ge=4, multiple_of=4, description="numbers that share a scale")] = 32
    residual: Annotated[int, Field(ge=4, description="newest tokens kept unrounded; a multiple of group")] = 128
    sink: Annotated[int, Field(ge=0, description="first tokens kept unrounded")] = 0
    keys: Annotated[
        Literal["channel", "token"],
        Field(description="whether keys share scales along each channel, or within each token as values do"),
    ] = "channel"

    def __post_init__(self) -> None:
        check_options(self, "kv")
        if self.residual % self.group:
            raise RecipeError(
                f"kv.residual: {self.residual} is not allowed; it must be a multiple of group, {self.group}"
            )

    @classmethod
    def of(cls, given: KV | Mapping[str, Any]) -> KV:
        """The options from a mapping; raises RecipeError for an unknown option or a value that is not allowed."""
        return given if isinstance(given, KV) else build(cls, given, "kv")

    def check_head(self, size: int) -> None:
        """Raise RecipeError if a head of `size` channels does not divide into groups."""
        if size % self.group:
            fitting = [g for g in range(4, min(size, self.group) + 1, 4) if size % g == 0]
            allowed = f"divide it, such as {max(fitting)}" if fitting else "divide it, and no multiple of 4 does"
            raise RecipeError(f"kv.group: {self.group} does not fit heads of {size} channels; it must {allowed}")


Kept = KV | Literal["latent"]  # `latent`: cache the vectors from which factored projections compute keys and values


def read_kept(given: Any) -> Kept:
    """The choice, from the word `latent` or from a mapping of options; raises RecipeError for anything else."""
    if given == "latent":
        return "latent"
    if isinstance(given, str):
        raise RecipeError(f"kv: {given!r} is not allowed; it must be latent, or options such as `bits: 4`")
    return KV.of(given)


def written(kept: Kept) -> dict[str, Any] | str:
    """The choice as plain data."""
    return asdict(kept) if isinstance(kept, KV) else kept
