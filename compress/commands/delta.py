"""`compress delta`: many fine-tuned models as small differences from one base."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from compress.commands.output import Json, Out, bytes_of, result, screen
from compress.errors import RecipeError

app = typer.Typer(name="delta", help="Store fine-tuned models as small differences from one base.")
Base = Annotated[str, typer.Option("--base", help="the model that was fine-tuned: a folder, or `builtin`")]
Table = Literal["own", "int8", "base"]


@app.command()
def extract(
    finetuned: Annotated[str, typer.Argument(help="folder of the fine-tuned model")],
    base: Base,
    method: Annotated[
        str, typer.Option(help="auto, bitdelta, dare, delta-come, deltazip, lowrank or sparse; see also --recipe")
    ] = "auto",
    bits: Annotated[
        float | None, typer.Option(help="bits a weight; default: 1, a sixteenth of the model's own")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="instead of --bits: bytes of all rewritten matrices, such as 40MB")
    ] = None,
    distill: Annotated[
        int, typer.Option(min=0, help="bitdelta: steps in which each block learns the scales of its signs")
    ] = 0,
    recipe: Annotated[str | None, typer.Option(help="instead of --method: a recipe, done to the difference")] = None,
    out: Out = None,
    data: Annotated[
        str | None, typer.Option(help="calibration text, best of what the model was tuned for; default: the recipe's")
    ] = None,
    embeddings: Annotated[Table, typer.Option(help="as fine-tuned, difference in 8 bits, or the base's")] = "own",
    head: Annotated[Table, typer.Option(help="the same of an output head of its own")] = "own",
    others: Annotated[Literal["own", "base"], typer.Option(help="norms, biases, whatever no pass rewrites")] = "own",
    vocabulary: Annotated[
        Literal["keep", "refuse"], typer.Option(help="what to do with tokens that the base does not have")
    ] = "keep",
    device: Annotated[str, typer.Option(help="where to compute: cpu, cuda, cuda:1")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="replace an existing output folder")] = False,
    as_json: Json = False,
) -> None:
    """Store what fine-tuning changed, as small as asked, in a folder that is pinned to its base."""
    import compress
    from compress import recipe as recipes
    from compress.codecs import passes_of
    from compress.console import Progress

    if bits is not None and size is not None:
        raise RecipeError("--size: says what --bits says; give one of both")
    wanted = 1.0 if bits is None else bits
    wanted = wanted if size is None else bits_within(bytes_of(size, "--size"), finetuned)
    made = recipes.load(recipe) if recipe else compress.Recipe(passes=passes_of(method, wanted, distill))
    delta = compress.Delta(base=base, embeddings=embeddings, head=head, others=others, vocabulary=vocabulary)
    calibration = made.calibration if data is None else replace(made.calibration, data=data)
    made = replace(made, delta=delta, calibration=calibration)
    target = out if out is not None else Path("out") / f"{Path(finetuned).resolve().name}-{method}"
    report = compress.run(finetuned, made, target, emit=Progress(screen()), device=device, force=force)
    value = {**{k: v for k, v in asdict(report).items() if k != "coverage"}, "share": share(report)}
    result(value, as_json)


def bits_within(size: int, model: str) -> float:
    """Bits a weight with which the matrices of a model take `size` bytes."""
    from compress.model.source import locate
    from compress.survey import survey

    parameters: int = sum(row["parameters"] for row in survey(locate(model))["sites"])
    return 8 * size / parameters


def share(report: object) -> float:
    """Bytes of the delta's tensors / bytes of the fine-tuned model's."""
    return float(report.artifact_bytes / report.source_bytes)  # type: ignore[attr-defined]


@app.command()
def apply(
    folder: Annotated[Path, typer.Argument(help="a delta")],
    base: Base,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Add a delta to its base: an ordinary model folder, written one tensor at a time and put in place when whole."""
    from compress.export.dense import export_dense
    from compress.model.source import locate

    place = locate(folder)
    target = out if out is not None else place.resolve().with_name(f"{place.resolve().name}-applied")
    done = export_dense(place, target, locate(base))
    line = f"{target}: {done.bytes:,} bytes; {done.note}"
    result({**asdict(done), "out": str(target)}, as_json, line)
