"""`compress attach`: a LoRA adapter becomes a part of the compressed model that it was trained on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from compress.commands.output import Json, out_option, result


def attach(
    folder: Annotated[Path, typer.Argument(help="a compressed model folder")],
    adapter: Annotated[Path, typer.Argument(help="folder of a LoRA adapter trained on it, as PEFT saves it")],
    out: Annotated[Path | None, out_option("<folder>-attached, beside it")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing output folder")] = False,
    as_json: Json = False,
) -> None:
    """Make a LoRA adapter, trained on a compressed model, a part of that model: one more low-rank term at each site."""
    from compress.adapters.attach import attach as write
    from compress.console import escape

    place = folder.resolve()
    target = out if out is not None else place.with_name(f"{place.name}-attached")
    done = write(folder, adapter, target, force=force)
    line = f"{done.out}: {done.bytes:,} bytes; {done.matrices} matrices have {done.parameters:,} more parameters"
    result({**asdict(done), "out": str(done.out)}, as_json, escape(line))
