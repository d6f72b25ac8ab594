"""`compress tune`: measures which kernels are faster on this machine, and saves a profile for models loaded later."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compress.commands.output import Json, out_option, result, screen
from compress.errors import RecipeError

CHOSEN = ("packed", "kernel")  # the packed product's names in a profile, on a CPU and on a GPU


def tune(
    device: Annotated[str, typer.Option(help="device to measure: cpu or cuda")] = "cpu",
    out: Annotated[Path | None, out_option("the path from which models load it", what="file to write")] = None,
    as_json: Json = False,
) -> None:
    """Measure where packed products are faster than plain ones on this machine; models loaded later use the result."""
    from rich.markup import escape
    from rich.table import Table

    from compress_kernels import tuning
    from compress_kernels.bench.tune import measurable
    from compress_kernels.bench.tune import tune as measure

    try:
        measurable(device)
        path = out if out is not None else tuning.place(device)
        tuning.ready(path)
        with screen().status("measuring") as status:
            profile = measure(device, lambda what: status.update(f"measuring {what}"))
        tuning.write(profile, path)
    except tuning.TuningError as error:
        raise RecipeError(str(error)) from error
    table = Table(title=f"{profile.device}, torch {profile.torch}, threads {profile.threads}: plain time / packed time")
    rows = sorted({key.rows for key in profile.entries})
    for name in ("format", "out x in", *(f"{count} row{'s' * (count > 1)}" for count in rows)):
        table.add_column(name, justify="left" if name == "format" else "right")
    for form, size, cells in by_size(profile, rows):
        table.add_row(form, size, *cells)
    value = {"out": str(path), "profile": [{**vars(key), **choice} for key, choice in sorted(profile.entries.items())]}
    result(value, as_json, table, f"* the packed product is chosen\n{escape(str(path))}")


def by_size(profile: Any, rows: list[int]) -> list[tuple[str, str, list[str]]]:
    """The table cells of each format and size; a star marks where the packed product is chosen."""
    lines = {(key.op, key.format, key.out, key.inputs): key for key in sorted(profile.entries)}
    found = []
    for op, form, out, inputs in lines:
        choices = profile.choices(op, form, out, inputs)
        cells = [f"{choices[n]['speedup']:.2f}{'*' if choices[n]['path'] in CHOSEN else ' '}" for n in rows]
        found.append((form, f"{out} x {inputs}", cells))
    return found
