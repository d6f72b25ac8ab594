"""What passes cost beside the walk: memory at its largest and work, from their options and the shape of a matrix.

A row was counted from the source of its pass and then compared with runs (docs/plan.md has the errors). A pass without
a row is not modelled, and the plan says so instead of guessing. Where a solver ends when it has converged, what it took
in trained models is expected. The tables: COSTS of what rewrites a matrix, LEARNED of what learns a block by its
output, AHEAD of what looks at the whole model before anything is rewritten.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from compress.passes.base import Budget, Pass, Reshape, SitePass
from compress.passes.budget import governed
from compress.planning.costs import lowrank, pruning, quantization
from compress.planning.costs.ahead import AHEAD, Ahead
from compress.planning.costs.learning import LEARNED
from compress.planning.costs.work import F32, MEASURED, Work
from compress.recipe import Recipe

COSTS: dict[str, Callable[[Any, int, int], Work]] = {**pruning.ROWS, **quantization.ROWS, **lowrank.ROWS}


def modelled(step: Pass | type[Pass]) -> bool:
    """Whether a pass has a row."""
    return step.name in COSTS or step.name in LEARNED or step.name in AHEAD


def not_modelled(recipe: Recipe) -> list[str]:
    """The passes whose own cost is left out."""
    return list(dict.fromkeys(step.name for step in recipe.passes if not modelled(step)))


def work_of(step: SitePass, shape: tuple[int, int]) -> Work:
    """What a pass costs on a matrix; nothing if it is not modelled."""
    found = COSTS.get(step.name)
    return Work() if found is None else found(step, *shape)


def governed_work(step: SitePass | None, rows: int, columns: int) -> Work:
    """What the pass that a budget governs costs on a matrix."""
    return Work() if step is None else work_of(step, (rows, columns))


def aheads(recipe: Recipe) -> list[tuple[Ahead, SitePass | None]]:
    """What looks at the whole model first, and the pass on whose sites it works; None if on all."""
    steps = recipe.weight_passes
    ruled = {id(budget): steps[index] for budget, index in governed(recipe.passes)}
    found: list[tuple[Ahead, SitePass | None]] = []
    for step in recipe.passes:
        if isinstance(step, Budget | Reshape) and step.name in AHEAD:
            own = ruled.get(id(step))
            found.append((AHEAD[step.name](step, own, partial(governed_work, own)), own))
    return found


__all__ = ["AHEAD", "COSTS", "F32", "LEARNED", "MEASURED", "Work", "aheads", "modelled", "not_modelled", "work_of"]
