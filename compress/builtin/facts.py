"""The facts the built-in model was taught: a frozen table with tiers and a calibration split.

Not here: how they are worded (`wordings.py`). Sources and licences: `ATTRIBUTION.md` beside this.
A fact belongs to exactly one split: facts of the `calibration` split may appear in calibration
data and are never asked in an evaluation; the `evaluation` split is the reverse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TIERS = {"head": 3.0, "torso": 1.5, "tail": 1.0}  # relative frequency of a fact in training


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One (relation, subject, object) triple; `id` is `relation:subject`."""

    relation: str
    subject: str
    object: str
    tier: str
    split: str

    @property
    def id(self) -> str:
        """The identity used to pair answers and to cluster statistics."""
        return f"{self.relation}:{self.subject}"


@cache
def facts(split: str | None = None) -> tuple[Fact, ...]:
    """All facts in table order, or those of one split (`evaluation` or `calibration`)."""
    rows = json.loads((Path(__file__).parent / "facts.json").read_text(encoding="utf-8"))
    table = (Fact(relation=r, subject=s, object=o, tier=t, split=p) for r, s, o, t, p in rows)
    return tuple(fact for fact in table if split in (None, fact.split))
