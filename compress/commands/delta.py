"""`compress delta`: stores fine-tuned models as small differences from one base, and applies them to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from compress.commands.output import Json, bytes_of, out_option, result, screen, spoken
from compress.errors import RecipeError

app = typer.Typer(name="delta", help="Store fine-tuned models as small differences from one base.")
Base = Annotated[str, typer.Option("--base", help="the base model that was fine-tuned: a folder, or `builtin`")]
Table = Literal["own", "int8", "base"]


@app.command()
def extract(
    finetuned: Annotated[str, typer.Argument(help="folder of the fine-tuned model")],
    base: Base,
    method: Annotated[
        str | None,
        typer.Option(
            help="auto (the default), bitdelta, dare, delta-come, deltazip, lowrank or sparse; or lora: the adapter "
            "that was merged, at the rank found for each matrix"
        ),
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="bits a weight; default: 1, a sixteenth of the model's own")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="instead of --bits: size of all rewritten matrices together, such as 40MB")
    ] = None,
    distill: Annotated[
        int | None, typer.Option(min=1, help="bitdelta: steps in which each block learns the scales of its signs")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="instead of --method: a recipe to apply to the difference")] = None,
    out: Annotated[Path | None, out_option("out/<folder>-<method>")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="calibration text, preferably of the kind that the model was tuned on; default: the recipe's"
        ),
    ] = None,
    embeddings: Annotated[
        Table | None,
        typer.Option(help="own: as fine-tuned (the default); int8: the difference in 8 bits; base: the base's"),
    ] = None,
    head: Annotated[Table | None, typer.Option(help="the same choices for an untied output head")] = None,
    others: Annotated[
        Literal["own", "base"] | None,
        typer.Option(help="own or base, for norms, biases and everything else that no pass rewrites"),
    ] = None,
    vocabulary: Annotated[
        Literal["keep", "refuse"] | None,
        typer.Option(help="keep (the default) or refuse a vocabulary of another size than the base's"),
    ] = None,
    device: Annotated[str, typer.Option(help="where to compute: cpu, cuda, cuda:1")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="replace an existing output folder")] = False,
    as_json: Json = False,
) -> None:
    """Store what fine-tuning changed, at the size asked for, in a folder that can only be used with the same base."""
    from compress import recipe as recipes
    from compress.codecs import recipes_of
    from compress.console import Progress, escape
    from compress.extraction import best_of, number_bits
    from compress.recipe import Delta, Recipe

    told = {"--method": method, "--bits": bits, "--size": size, "--distill": distill}
    policies = {"embeddings": embeddings, "head": head, "others": others, "vocabulary": vocabulary}
    chosen: Any = {"base": base, **{key: value for key, value in policies.items() if value is not None}}
    if recipe is not None:
        spare = [option for option, value in told.items() if value is not None]
        if spare:
            raise RecipeError(f"{spare[0]}: cannot be combined with --recipe; give only one of the two")
        loaded = recipes.load(recipe)
        made = [replace(loaded, delta=replace(loaded.delta or Delta(base=base), **chosen))]
    else:
        check_sized(method, told)
        asked = bits_of(bits, size, finetuned)
        lists = recipes_of(method or "auto", asked, distill or 0, number_bits(finetuned))
        made = [Recipe(passes=passes, delta=Delta(**chosen)) for passes in lists]
    name = Path(recipe).name.removesuffix(".yaml") if recipe is not None else method or "auto"
    called = {f"delta.{key}": f"--{key}" for key in chosen}  # all other delta options come from the recipe
    if data is not None:
        if not any(one.needs_data() for one in made):
            raise RecipeError(f"--data: {name} uses no calibration data; leave --data out")
        made = [replace(one, calibration=replace(one.calibration, data=data)) for one in made]
        called["calibration.data"] = "--data"
    target = out if out is not None else Path("out") / f"{Path(finetuned).resolve().name}-{name}"
    with spoken(called):
        found = best_of(finetuned, made, target, emit=Progress(screen()), device=device, force=force)
    report = found.report
    value = {**{k: v for k, v in asdict(report).items() if k != "coverage"}, "share": share(report)}
    lines = [escape(f"probe KL {kl:.4g} nats: {passes}") for passes, kl in found.tried.items()] if len(made) > 1 else []
    result({**value, "tried": found.tried}, as_json, *lines)


def check_sized(method: str | None, told: Mapping[str, Any]) -> None:
    """Raise RecipeError if a size is given for a method that finds its own."""
    from compress.codecs import UNSIZED

    given = [option for option in ("--bits", "--size") if told[option] is not None]
    if method in UNSIZED and given:
        raise RecipeError(f"{given[0]}: {method} finds its size itself; leave it out")


@app.command("import")
def take(
    adapter: Annotated[Path, typer.Argument(help="folder of a LoRA adapter, as PEFT saves it")],
    base: Base,
    out: Annotated[Path | None, out_option("out/<folder>-delta")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing output folder")] = False,
    as_json: Json = False,
) -> None:
    """Make a delta of a LoRA adapter, to load, serve or merge it; its factors are stored exactly as they are."""
    from compress.adapters import import_adapter
    from compress.console import escape

    target = out if out is not None else Path("out") / f"{adapter.resolve().name}-delta"
    done = import_adapter(adapter, base, target, force=force)
    line = f"{done.out}: {done.bytes:,} bytes; {done.matrices} matrices, {done.parameters:,} parameters"
    result({**asdict(done), "out": str(done.out)}, as_json, escape(line))


def bits_of(bits: float | None, size: str | None, model: str) -> float:
    """The bits a weight that --bits gives, or with which the matrices of a model take `size` bytes; 1 by default.

    Raises RecipeError if both are given, or if `size` is not less than the matrices take whole.
    """
    from compress.codecs import PLAIN
    from compress.model.source import locate
    from compress.survey import survey

    if size is None:
        return 1.0 if bits is None else bits
    if bits is not None:
        raise RecipeError("--size: cannot be combined with --bits; give only one of the two")
    parameters: int = sum(row["parameters"] for row in survey(locate(model))["sites"])
    asked = 8 * bytes_of(size, "--size")
    if asked >= parameters * PLAIN:
        raise RecipeError(
            f"--size: {size} is not less than the {parameters * PLAIN // 8:,} bytes of the uncompressed matrices"
        )
    return asked / parameters


def share(report: object) -> float:
    """The bytes of the delta's tensors, divided by those of the fine-tuned model."""
    return float(report.artifact_bytes / report.source_bytes)  # type: ignore[attr-defined]


@app.command()
def apply(
    folder: Annotated[Path, typer.Argument(help="a delta")],
    base: Base,
    out: Annotated[Path | None, out_option("<folder>-applied, beside it")] = None,
    as_json: Json = False,
) -> None:
    """Add a delta to its base, and write the result as an ordinary model folder.

    It is written one tensor at a time and put in place only when it is complete.
    """
    from compress.console import escape
    from compress.export.dense import export_dense
    from compress.model.source import locate

    place = locate(folder)
    target = out if out is not None else place.resolve().with_name(f"{place.resolve().name}-applied")
    done = export_dense(place, target, locate(base))
    line = escape(f"{target}: {done.bytes:,} bytes; {done.note}")
    result({**asdict(done), "out": str(target)}, as_json, line)
