"""The peak memory and the work of passes in addition to the walk, from their options and the shape of a matrix.

Each row was counted from the source of its pass and then compared with runs (docs/plan.md lists the errors). A pass
without a row is not modelled, and the plan says so instead of guessing. For a solver that stops on convergence, the row
assumes the number of iterations that trained models took. There are three tables: COSTS for passes that rewrite a
matrix, LEARNED for those that learn a block from its output, and AHEAD for those that examine the whole model before
anything is rewritten.
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
    """Whether a pass has a row in one of the tables."""
    return step.name in COSTS or step.name in LEARNED or step.name in AHEAD


def not_modelled(recipe: Recipe) -> list[str]:
    """The names of the passes whose own cost is left out, because they have no row."""
    return list(dict.fromkeys(step.name for step in recipe.passes if not modelled(step)))


def work_of(step: SitePass, shape: tuple[int, int]) -> Work:
    """The cost of a pass on a matrix; no work if it has no row in COSTS."""
    found = COSTS.get(step.name)
    return Work() if found is None else found(step, *shape)


def governed_work(step: SitePass | None, rows: int, columns: int) -> Work:
    """The cost on a matrix of the pass that a budget governs; no work without such a pass."""
    return Work() if step is None else work_of(step, (rows, columns))


def aheads(recipe: Recipe) -> list[tuple[Ahead, SitePass | None]]:
    """The cost of each pass that examines the whole model first, and the pass whose sites it examines; None for all."""
    steps = recipe.weight_passes
    ruled = {id(budget): steps[index] for budget, index in governed(recipe.passes)}
    found: list[tuple[Ahead, SitePass | None]] = []
    for step in recipe.passes:
        if isinstance(step, Budget | Reshape) and step.name in AHEAD:
            own = ruled.get(id(step))
            found.append((AHEAD[step.name](step, own, partial(governed_work, own)), own))
    return found


__all__ = ["AHEAD", "COSTS", "F32", "LEARNED", "MEASURED", "Work", "aheads", "modelled", "not_modelled", "work_of"]
