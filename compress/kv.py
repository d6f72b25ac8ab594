"""The options of a quantized key-value cache, as a recipe or `load` gives them.

Not here: the cache itself (`runtime/kv.py`). A recipe only records the options; nothing in the stored weights depends
on them, and `load` may choose others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from compress.errors import RecipeError
from compress.options import build, check_options


@dataclass(frozen=True, kw_only=True)
class KV:
    """How keys and values of past tokens are kept: rounded, but for the first `sink` and the newest `residual` tokens.

    A group of `group` numbers shares a scale and a minimum of 16 bits each, so a rounded number takes
    `bits + 32 / group` bits. Keys wait until `residual` of them are there and are rounded together; values one by one.
    """

    bits: Annotated[Literal[8, 4, 2], Field(description="of a rounded key or value")] = 4
    group: Annotated[int, Field(ge=4, multiple_of=4, description="numbers that share a scale")] = 32
    residual: Annotated[int, Field(ge=4, description="newest tokens kept as they are; a multiple of group")] = 128
    sink: Annotated[int, Field(ge=0, description="first tokens kept as they are")] = 0
    keys: Annotated[
        Literal["channel", "token"], Field(description="keys share scales along a channel, or as values do in a token")
    ] = "channel"

    def __post_init__(self) -> None:
        check_options(self, "kv")
        if self.residual % self.group:
            raise RecipeError(
                f"kv.residual: {self.residual} is not allowed; it must be a multiple of group, {self.group}"
            )

    @classmethod
    def of(cls, given: KV | Mapping[str, Any], where: str = "kv") -> KV:
        """The options from a mapping; raises RecipeError for an unknown or unfit one."""
        return given if isinstance(given, KV) else build(cls, given, where)

    def check_head(self, size: int) -> None:
        """Raise RecipeError if a head of `size` channels does not divide into groups."""
        if size % self.group:
            fitting = [g for g in range(4, min(size, self.group) + 1, 4) if size % g == 0]
            allowed = f"divide it, such as {max(fitting)}" if fitting else "divide it, and no multiple of 4 does"
            raise RecipeError(f"kv.group: {self.group} does not fit heads of {size} channels; it must {allowed}")
