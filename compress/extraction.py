"""`extract`: what fine-tuning changed, by a method and a size; of what a method leaves open, the better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.codecs import recipes_of
from compress.driver import compress
from compress.events import Event, RunFinished, RunInterrupted
from compress.job import Report
from compress.model.source import dtype_of, locate
from compress.partial import beside, exchange
from compress.passes.manager import ignore
from compress.plan import free_place
from compress.recipe import Calibration, Delta, Recipe
from compress.sources import open_source


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What is in `out`, and the KL on the probe, in nats, of each recipe that was tried, by its passes."""

    report: Report
    tried: dict[str, float]


def extract(
    finetuned: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    method: str = "auto",
    bits: float = 1.0,
    distill: int = 0,
    calibration: Calibration | None = None,
    force: bool = False,
    emit: Callable[[Event], None] = ignore,
    device: str = "cpu",
    **policies: Any,
) -> Extracted:
    """Store the difference of a fine-tuned model from its base in the folder `out`, in so many bits a weight.

    `method` is one of `compress.codecs.METHODS`; `policies` are the options of `Delta` but its base. `auto` tries the
    nearest matrices and unbiased ones, and keeps what diverges less on tokens that no statistic saw. Raises
    CompressError children; `out` is then as it was before.
    """
    delta = Delta(base=str(base), **policies)
    recipes = [
        Recipe(passes=passes, delta=delta, calibration=calibration or Calibration())
        for passes in recipes_of(method, bits, distill, number_bits(finetuned))
    ]
    return best_of(finetuned, recipes, Path(out), force=force, emit=emit, device=device)


def number_bits(model: str | Path) -> int:
    """Bits of a number of a model, in which a delta of it keeps its factors."""
    return 8 * dtype_of(open_source(locate(model)).config).itemsize


def best_of(
    finetuned: str | Path, recipes: Sequence[Recipe], out: Path, *, force: bool = False, **options: Any
) -> Extracted:
    """Run each recipe beside `out`, and put the folder of the least KL on the probe in its place."""
    target = free_place(out, locate(finetuned).resolve(), force)
    if len(recipes) == 1:
        report = compress(finetuned, recipes[0], target, force=force, **options)
        return Extracted(report=report, tried={named(recipes[0]): report.kl})
    emit = options.pop("emit", ignore)

    def told(event: Event) -> None:  # nobody is to look for what is about to be moved, or will be gone
        if not isinstance(event, RunInterrupted):
            emit(replace(event, out=str(target)) if isinstance(event, RunFinished) else event)

    with beside(target) as folder:
        reports = [compress(finetuned, r, folder / str(i), emit=told, **options) for i, r in enumerate(recipes)]
        tried = {named(recipe): report.kl for recipe, report in zip(recipes, reports, strict=True)}
        best = min(reports, key=lambda report: report.kl)
        exchange(best.out, target)
    return Extracted(report=replace(best, out=target), tried=tried)


def named(recipe: Recipe) -> str:
    """What a recipe does, in one line."""
    return ", ".join(str(step) for step in recipe.passes)
