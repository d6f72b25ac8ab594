"""`compress plan`: predicts what a run will write and need, before any weight is read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.commands.output import Json, bytes_of, one_model, out_option, result


def plan(
    recipe: Annotated[str, typer.Argument(help="a recipe file, or the name of a packaged one")] = "quickstart",
    model: Annotated[str | None, typer.Option(help="model folder, or `builtin`; default: the recipe's")] = None,
    out: Annotated[Path, out_option(what="where the artifact would go; its disk is checked")] = Path("out"),
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="change one option of the recipe, such as passes.0.sparsity=0.6; repeatable"),
    ] = None,
    device: Annotated[str, typer.Option(help="where to compute: cpu, cuda, cuda:1")] = "cpu",
    memory: Annotated[str | None, typer.Option(help="memory available, such as 16GB; default: what is free")] = None,
    disk: Annotated[
        str | None, typer.Option(help="disk space available, such as 100GB; default: what is free under --out")
    ] = None,
    sites: Annotated[bool, typer.Option("--sites", "-v", help="list every site")] = False,
    offload: Annotated[bool, typer.Option("--offload", help="keep calibration activations on disk, as in run")] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="decode a model that is already quantized, as in run")
    ] = False,
    as_json: Json = False,
) -> None:
    """Predict what a run will write and need, from headers alone: bytes, memory, time, coverage, contracts, licence.

    Exit code 3 if it will not fit.
    """
    from compress import recipe as recipes
    from compress.planning import plan_run

    one_model(model, changes or [])
    found = plan_run(
        model,
        recipes.load(recipe, changes or []),
        out=out,
        device=device,
        memory=None if memory is None else bytes_of(memory, "--memory"),
        disk=None if disk is None else bytes_of(disk, "--disk"),
        offload=offload,
        dequantize=dequantize,
    )
    result(value_of(found), as_json, *shown(found, sites), *unkept(device))
    found.check()


def unkept(device: str) -> list[str]:
    """A note that the machine is measured again every time, if its profile could not be saved."""
    from rich.markup import escape

    from compress.planning.machine import place

    path = place(device)
    return (
        []
        if path.exists()
        else [f"[dim]the machine is measured again each time: {escape(str(path))} cannot be written[/]"]
    )


def value_of(found: Any) -> dict[str, Any]:
    """A plan as plain data, including its derived values."""
    needs = {name: {**asdict(need), "fits": need.fits} for name, need in found.needs.items()}
    sites = [{**asdict(site), "exact": site.exact} for site in found.sites]
    return {**asdict(found), "needs": needs, "sites": sites, "total_seconds": found.total_seconds}


def shown(found: Any, every: bool) -> list[Any]:
    """The tables and lines that are printed without --json; with `every`, also a table of every site."""
    from rich.markup import escape

    from compress.console import change, size

    exact = "exactly" if found.exact else f"about, at most {found.most:,}:"
    head = (
        f"[bold]{escape(found.model)}[/] ({escape(found.family)}, "
        f"{'tested' if found.tested_family else 'not a tested family'}, "
        f"{found.dtype}): {size(found.source_bytes)} -> {exact} [bold]{found.bytes:,}[/] bytes of tensors "
        f"({change(found.source_bytes, found.bytes)}), {found.bits_per_weight:.2f} bits a block weight"
    )
    head += f" [dim](if {'; and if '.join(found.assumes)})[/]" if found.assumes else ""
    lines: list[Any] = [head, *(f"a model {change}" for change in found.reshaped), classes_table(found)]
    lines += [sites_table(found)] if every else []
    lines += [contracts_table(found), *left_alone(found), needs_table(found), *time_lines(found)]
    said = ", ".join(f"{key}: {value}" for key, value in found.licence.items())
    lines.append(f"licence: {said or '[yellow]not stated, in neither the card nor a LICENSE file[/]'}")
    return [*lines, *(f"[yellow]trust:[/] {flag}" for flag in found.trust or ["nothing that could run code"])]


def classes_table(found: Any) -> Any:
    """The table of bytes by class of tensor."""
    from rich.table import Table

    table = Table(title="tensors")
    for name in ("class", "tensors", "parameters", "bytes before", "bytes after", "at most"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for row in found.classes:
        numbers = (row.tensors, row.parameters, row.source_bytes, row.bytes, row.most)
        table.add_row(row.name, *(f"{number:,}" for number in numbers))
    return table


def sites_table(found: Any) -> Any:
    """The table of every site."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="sites")
    for name in ("site", "out x in", "weight", "bytes", "at most", "note"):
        table.add_column(name, justify="right" if name in ("out x in", "bytes", "at most") else "left", overflow="fold")
    for row in found.sites:
        shape = f"{row.shape[0]} x {row.shape[1]}"
        most = "exact" if row.exact else f"{row.most:,}"
        table.add_row(row.site, shape, escape(row.forms[-1]), f"{row.bytes:,}", most, row.note)
    return table


def contracts_table(found: Any) -> Any:
    """The table of what each pass takes, gives and keeps; a recipe whose passes do not fit was refused earlier."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="passes, in order; each accepts the form that the previous one leaves")
    for name in ("pass", "sites", "parameters", "takes", "gives", "statistics", "keeps", "first site"):
        table.add_column(name, justify="right" if name in ("sites", "parameters") else "left", overflow="fold")
    for row in found.passes:
        forms = f"{row.before} -> {row.after}" if row.sites else ""
        table.add_row(
            escape(row.options), f"{row.sites:,}" if row.takes or row.sites else "", f"{row.parameters:,}",
            " or ".join(row.takes) or "any", row.gives, ", ".join(row.requires) or "none", ", ".join(row.keeps),
            escape(forms),
        )  # fmt: skip
    return table


def left_alone(found: Any) -> list[str]:
    """The lines on parameters that no pass touches, by reason."""
    return [f"parameters left alone: {count:,} ({reason})" for reason, count in found.untouched.items()]


def needs_table(found: Any) -> Any:
    """The table of memory and disk: what is needed and what is available."""
    from rich.table import Table

    from compress.console import size

    table = Table(title="at the peak")
    for name in ("what", "needed", "available", "parts"):
        table.add_column(name, justify="right" if name in ("needed", "available") else "left", overflow="fold")
    for name, need in found.needs.items():
        there = "not known" if need.there is None else f"{size(need.there)} ({need.where})"
        parts = ", ".join(f"{size(count)} {part}" for part, count in need.parts.items() if count)
        table.add_row(name, size(need.bytes) if need.fits else f"[red]{size(need.bytes)}[/]", there, parts)
    return table


def time_lines(found: Any) -> list[str]:
    """The lines on the predicted time, and on what it does not include."""
    parts = ", ".join(f"{seconds:.0f} s {part}" for part, seconds in found.seconds.items() if seconds >= 0.5)
    lines = [f"time: about [bold]{found.total_seconds:.0f} s[/] on this machine, if otherwise idle ({parts})"]
    if found.unmodelled:
        lines.append(f"[yellow]not modelled in memory or time:[/] {', '.join(found.unmodelled)}")
    return lines
