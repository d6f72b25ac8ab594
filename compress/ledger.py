"""The entry of compress.json about a site, in words, for `compress inspect` and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def notes(row: Mapping[str, Any]) -> list[str]:
    """What a reader should know about a site beside its sizes and its final errors.

    Damping, failed damping, dead inputs, the weight error after each step, fallbacks, starvation; empty if there is
    none of these.
    """
    failed = ", ".join(f"{tried:g}" for tried in row.get("damping_failed", []))
    said = [f"damping {row['damping']:g}"] if row.get("damping") else []
    said += [f"damping {failed} failed"] if failed else []
    said += ["errors without the adapter"] if row.get("adapter") else []
    said += [f"{row['dead_inputs']} dead inputs"] if row.get("dead_inputs") else []
    if "errors" in row:
        said.append("weight error " + " -> ".join(f"{step} {error:.4f}" for step, error in row["errors"]))
    said += [f"fallback of {step}: {reason}" for step, reason in row["fallbacks"]]
    return said + ([f"starved: {'; '.join(row['starved'])}"] if row.get("starved") else [])
