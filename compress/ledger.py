"""What compress.json says of a site, in words: for `compress inspect` and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def notes(row: Mapping[str, Any]) -> list[str]:
    """What is to be known of a site beside its sizes and errors; nothing where all went as asked."""
    failed = ", ".join(f"{tried:g}" for tried in row.get("damping_failed", []))
    said = [f"damping {row['damping']:g}"] if row.get("damping") else []
    said += [f"damping {failed} failed"] if failed else []
    said += [f"{row['dead_inputs']} dead inputs"] if row.get("dead_inputs") else []
    if "errors" in row:
        said.append("weight error " + " -> ".join(f"{step} {error:.4f}" for step, error in row["errors"]))
    said += [f"fallback of {step}: {reason}" for step, reason in row["fallbacks"]]
    return said + ([f"starved: {'; '.join(row['starved'])}"] if row.get("starved") else [])
