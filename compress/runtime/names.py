"""Maps the keys in an artifact's files to the keys of the modules that hold them, as a transformers key renaming.

transformers renames keys by patterns that end where a known parameter name ends, so they would miss the extra tensors
of a compressed weight (scales, zero points, masks). Keys that this package stored are therefore looked up in a table as
a whole; all other keys go through the family's rules as usual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.core_model_loading import WeightRenaming, apply_renamings


class StoredNames(WeightRenaming):  # type: ignore[misc]
    """Renames keys by a table, and keys that are not in it by the family's own rules."""

    __slots__ = ("others", "table")

    def __init__(self, table: Mapping[str, str], others: Sequence[Any]) -> None:
        super().__init__("$^", "$^")  # a pattern that never matches; `rename_source_key` below does not use it
        self.table, self.others = dict(table), list(others)

    def was_used(self) -> bool:
        """Always True, since every artifact has stored keys."""
        return True

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new key, and None for the source pattern, since this renaming converts no tensors."""
        if source_key in self.table:
            return self.table[source_key], None
        return apply_renamings(source_key, self.others), None

    def reverse_transform(self) -> StoredNames:
        """The inverse renaming, for saving; family rules that were not used while loading are left out."""
        back = {new: old for old, new in self.table.items()}
        return StoredNames(back, [rule.reverse_transform() for rule in reversed(self.others) if rule.was_used()])
