"""The two relations with which an instruction bounds a count."""

from __future__ import annotations


def meets(count: int, relation: str, bound: int) -> bool:
    """Whether the count is `at least` or `less than` the bound; raises ValueError for any other relation."""
    match relation:
        case "at least":
            return count >= bound
        case "less than":
            return count < bound
        case _:
            raise ValueError(f"an instruction counts `at least` or `less than`, not {relation!r}")
