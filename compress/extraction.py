"""`extract`: stores what fine-tuning changed, by a method and at a size; if several recipes qualify, the best one."""

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
    """The report of what is in `out`, and the KL on the probe, in nats, of each recipe tried, by its passes."""

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
    """Store the difference between a fine-tuned model and its base in the folder `out`, in `bits` bits per weight.

    `method` is one of `compress.codecs.METHODS`; `lora` finds its size itself and ignores `bits`. `auto` tries both the
    nearest matrices and unbiased ones, and keeps the result with the smaller divergence on tokens that no statistic
    saw. `policies` are the options of `Delta` other than `base`: what is stored of embeddings, head, other tensors and
    vocabulary. Raises CompressError subclasses; `out` is then as it was before.
    """
    delta = Delta(base=str(base), **policies)
    recipes = [
        Recipe(passes=passes, delta=delta, calibration=calibration or Calibration())
        for passes in recipes_of(method, bits, distill, number_bits(finetuned))
    ]
    return best_of(finetuned, recipes, Path(out), force=force, emit=emit, device=device)


def number_bits(model: str | Path) -> int:
    """The bits of the model's dtype, which is the dtype of a delta's factors."""
    return 8 * dtype_of(open_source(locate(model)).config).itemsize


def best_of(
    finetuned: str | Path, recipes: Sequence[Recipe], out: Path, *, force: bool = False, **options: Any
) -> Extracted:
    """Run each recipe in a folder beside `out`, and put the result with the least KL on the probe in place."""
    target = free_place(out, locate(finetuned).resolve(), force)
    if len(recipes) == 1:
        report = compress(finetuned, recipes[0], target, force=force, **options)
        return Extracted(report=report, tried={named(recipes[0]): report.kl})
    emit = options.pop("emit", ignore)

    def told(event: Event) -> None:  # hides the temporary folders, which will be moved or removed
        if not isinstance(event, RunInterrupted):
            emit(replace(event, out=str(target)) if isinstance(event, RunFinished) else event)

    with beside(target) as folder:
        reports = [compress(finetuned, r, folder / str(i), emit=told, **options) for i, r in enumerate(recipes)]
        tried = {named(recipe): report.kl for recipe, report in zip(recipes, reports, strict=True)}
        best = min(reports, key=lambda report: report.kl)
        exchange(best.out, target)
    return Extracted(report=replace(best, out=target), tried=tried)


def named(recipe: Recipe) -> str:
    """The passes of a recipe, in one line."""
    return ", ".join(str(step) for step in recipe.passes)
