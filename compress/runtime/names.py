"""Keys of an artifact's files <-> keys of the modules that hold them, in transformers' own terms.

transformers renames keys by patterns that end where a known name ends, so the companions of a payload would fall
through them. What we stored is looked up whole; everything else takes the way it always took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.core_model_loading import WeightRenaming, apply_renamings


class StoredNames(WeightRenaming):  # type: ignore[misc]
    """A renaming by a table, and by the family's own rules for keys that are not in it."""

    __slots__ = ("others", "table")

    def __init__(self, table: Mapping[str, str], others: Sequence[Any]) -> None:
        super().__init__("$^", "$^")  # never matches; `rename_source_key` below does not ask
        self.table, self.others = dict(table), list(others)

    def was_used(self) -> bool:
        """Always: every artifact has stored keys."""
        return True

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new key; no source pattern, since this is not a conversion."""
        if source_key in self.table:
            return self.table[source_key], None
        return apply_renamings(source_key, self.others), None

    def reverse_transform(self) -> StoredNames:
        """The way back, for saving; rules that were not used while loading are not used then either."""
        back = {new: old for old, new in self.table.items()}
        return StoredNames(back, [rule.reverse_transform() for rule in reversed(self.others) if rule.was_used()])
