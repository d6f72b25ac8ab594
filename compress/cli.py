"""The command line: it parses arguments, calls the library and prints. Results go to stdout, the rest to stderr.

Exit codes: 0 ok, 1 `diff` found a difference, 2 bad input, 3 does not fit, 4 verification failed, 5 acceptance failed,
6 some cells of a sweep failed, 7 another process of the run was lost, 130 interrupted, 141 the reader of stdout left.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.main import get_command

from compress import __version__
from compress.commands import delta
from compress.commands.attach import attach
from compress.commands.diff import diff
from compress.commands.doctor import doctor
from compress.commands.eval import evaluate
from compress.commands.judge import judge
from compress.commands.leaderboard import leaderboard
from compress.commands.merge import merge
from compress.commands.output import Json, bytes_of, one_model, out_option, quiet_loading, result, screen, spoken
from compress.commands.plan import plan
from compress.commands.recipes import recipes
from compress.commands.serve import serve
from compress.commands.sweep import sweep
from compress.commands.tasks import tasks
from compress.commands.tune import tune
from compress.errors import CompressError, RecipeError, nearest, out_of_memory

app = typer.Typer(
    name="compress",
    help="Compress Hugging Face language models and prove what was lost.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130
UNREAD = 141  # what a shell reports for a command that SIGPIPE ended: 128 + 13
app.add_typer(delta.app)
app.command("eval")(evaluate)
app.command()(diff)
app.command()(doctor)
app.command()(judge)
app.command()(leaderboard)
app.command()(tasks)
app.command()(attach)
app.command()(merge)
app.command()(plan)
app.command()(recipes)
app.command()(serve)
app.command()(sweep)
app.command()(tune)
UsageError: Any = typer.BadParameter.__base__  # click's, or the copy of click that typer carries since 0.2x


def show_version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        typer.echo(f"compress {__version__}")
        raise typer.Exit


@app.callback(epilog="`--debug`, anywhere on the line, shows the traceback of an error.")
def options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True)] = False,
) -> None:
    """Compress Hugging Face language models and prove what was lost."""
    del version


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="a recipe file, or the name of a packaged one")] = "quickstart",
    model: Annotated[str | None, typer.Option(help="model folder, or `builtin`; default: the recipe's")] = None,
    out: Annotated[Path | None, out_option("out/<recipe>")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="change one option of the recipe, such as passes.0.sparsity=0.6; repeatable"),
    ] = None,
    device: Annotated[str, typer.Option(help="where to compute: cpu, cuda, cuda:1")] = "cpu",
    log: Annotated[Path | None, typer.Option(help="append every event as a JSON line to this file")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing output folder")] = False,
    shard_size: Annotated[str, typer.Option(help="largest shard, such as 500MB or 5GB")] = "5GB",
    offload: Annotated[bool, typer.Option("--offload", help="keep calibration activations on disk")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="discard the work of an interrupted run instead of resuming it")
    ] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="decode a model that is already quantized, instead of refusing it")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compress a model by a recipe into a new folder, which is verified before it is put in place.

    If a run was stopped or killed, the same command resumes it after the last finished block.
    Started with `torchrun --nproc-per-node N -m compress run ...`, N processes share the work.
    """
    import compress
    from compress import events
    from compress import recipe as read
    from compress.console import Progress
    from compress.model.memory import release_early
    from compress.team import joined

    one_model(model, changes or [])
    release_early()
    quiet_loading()
    target = out if out is not None else Path("out") / Path(recipe).name.removesuffix(".yaml")
    with joined(device, once=True) as team:
        loaded = read.load(recipe, changes or [])
        sinks: list[events.Sink] = [Progress(screen())]
        if log is not None and team.chief:
            sinks.append(events.jsonl(log))  # opened now, so that an unwritable path is refused before any work
        report = compress.run(
            model,
            loaded,
            target,
            emit=events.fan_out(sinks),
            device=device,
            force=force,
            shard_size=bytes_of(shard_size, "--shard-size"),
            offload=offload,
            dequantize=dequantize,
            restart=restart,
        )
    if not team.chief:
        return
    touched = sum(report.coverage.touched.values())
    coverage = {"touched": touched, "missed": report.coverage.missed, "untouched": report.coverage.reasons()}
    result({**{k: v for k, v in asdict(report).items() if k != "coverage"}, "coverage": coverage}, as_json)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="any model folder")],
    picture: Annotated[
        Path | None, typer.Option(help="SVG to write: error and size of a compressed model's sites over depth")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was done to each site (weight matrix) of a compressed model, or list the sites of any other model."""
    from compress.artifact import Artifact, is_artifact
    from compress.console import inspect_table, survey_table
    from compress.model.anatomy import by_reason
    from compress.model.source import locate
    from compress.survey import survey

    if not is_artifact(locate(folder)):
        if picture is not None:
            raise RecipeError(f"--picture: {folder} is not a compressed model, so there are no errors to draw")
        found = survey(locate(folder)) | {"path": str(folder)}
        result(found, as_json, *survey_table(found))
        return
    made = Artifact(locate(folder)).provenance
    if picture is not None:
        if picture.resolve().parent == locate(folder).resolve():
            raise RecipeError(
                f"--picture: {folder} is an artifact and may hold no other file; write the picture elsewhere"
            )
        draw(made, picture)
    view = {
        "path": str(folder), "source": made["source"]["name"], "version": made["versions"]["compress"],
        "calibration": made["calibration"]["name"], "sizes": made["sizes"], "probe": made["probe"],
        "recipe": made["recipe"], "untouched": by_reason(made["untouched"].values()),
        "reshaped": made.get("reshaped", []), "base": made.get("base"), "sites": made["sites"],
    }  # fmt: skip
    result(view, as_json, *inspect_table(view))


def draw(provenance: Any, target: Path) -> None:
    """Write the picture of an artifact; raises RecipeError if nothing can be drawn or `target` cannot be written."""
    from compress.partial import put
    from compress.picture import picture

    drawn = picture(provenance)
    if not drawn:
        raise RecipeError("--picture: no site of a block was rewritten; there is nothing to draw")
    if target.suffix != ".svg":
        raise RecipeError(f"--picture: {target} must be named .svg")
    try:
        put(target, lambda partial: partial.write_text(drawn, encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"--picture: {target} cannot be written: {error.strerror}") from error


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="a compressed model folder")],
    base: Annotated[str | None, typer.Option(help="for a delta: its base model, to check it against")] = None,
    as_json: Json = False,
) -> None:
    """Check every byte of a compressed model: hashes, decoding, tensor names and shapes."""
    from compress.artifact import verify as check
    from compress.model.source import locate

    try:
        checks = check(locate(folder), None if base is None else locate(base))
    except CompressError as error:
        if as_json:
            result({"folder": str(folder), "ok": False, "checks": [], "error": str(error)}, as_json)
        raise
    result({"folder": str(folder), "ok": True, "checks": checks}, as_json, *checks, "[green]verified[/]")


@app.command()
def bench(
    folder: Annotated[Path, typer.Argument(help="a compressed model folder")],
    rows: Annotated[
        str, typer.Option(help="numbers of input rows (tokens in one call) to time, separated by commas")
    ] = "1,8,64",
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="also time modules that keep only the packed weights in memory")
    ] = False,
    generate: Annotated[bool, typer.Option("--generate", help="also time greedy generation, batch 1")] = False,
    base: Annotated[str | None, typer.Option(help="the dense model; default: what the artifact was made from")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="with --generate: tokens of the prompt")] = 64,
    new: Annotated[int, typer.Option(min=2, help="with --generate: tokens generated")] = 128,
    runs: Annotated[int, typer.Option(min=1, help="with --generate: times that each model generates, in turn")] = 5,
    device: Annotated[str, typer.Option(help="where to compute: cpu, cuda, cuda:1")] = "cpu",
    as_json: Json = False,
) -> None:
    """Time each kind of layer, and generation, against the dense model: what is faster, what is slower, and why."""
    from compress.console import generation_table, layers_table
    from compress.model.source import locate
    from compress.plan import usable
    from compress.runtime import bench as timing

    place, counts = locate(folder), row_counts(rows)
    timing.whole(place)  # refuses what is no whole compressed model, before models are loaded
    if base is not None and not generate:
        raise RecipeError("--base: is used only with --generate; add that, or leave --base out")
    usable(device)
    quiet_loading()
    with screen().status("timing"):
        generated = []
        if generate:
            loaded = models_to_time(place, base, low_memory, device)
            generated = timing.measure_generation(loaded, prompt=prompt, new=new, runs=runs)
            del loaded  # before the layers need memory
        layers = timing.measure_layers(place, counts, low_memory=low_memory, device=device)
    conditions, notes = timing.conditions(place, device), timing.layer_sentences(layers)
    value = {"folder": str(folder), "conditions": conditions, "layers": [asdict(row) for row in layers], "notes": notes}
    shown = layers_table(layers, notes)
    if generate:
        notes = timing.generation_sentences(generated)
        models = [asdict(row) for row in generated]
        value["generation"] = {
            "device": device,
            "prompt": prompt,
            "new": new,
            "runs": runs,
            "models": models,
            "notes": notes,
        }
        shown += generation_table(
            generated, f"{prompt} + {new} tokens, medians of {runs} runs in turn, {device}", notes
        )
    result(value, as_json, *shown, f"[dim]{', '.join(f'{k} {v}' for k, v in conditions.items())}[/]")


def row_counts(text: str) -> list[int]:
    """The numbers of `1,8,64`; raises RecipeError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,5}", part) for part in parts):
        raise RecipeError(f"--rows: {text!r} is not a list of whole numbers from 1 to 999999 such as 1,8,64")
    return [int(part) for part in parts]


def models_to_time(folder: Path, base: str | None, low_memory: bool, device: str) -> dict[str, Any]:
    """The loaded models that are timed, by name: the dense one that an artifact was made from, and the artifact."""
    import compress
    from compress.artifact import check_base, recorded_base
    from compress.model.source import locate
    from compress.plan import placed

    source = base if base is not None else recorded_base(folder)
    check_base([folder], locate(source))
    there = placed(device)
    models = {"dense": compress.load(locate(source), **there), "compressed": compress.load(folder, **there)}
    return models | ({"compressed, low memory": compress.load(folder, low_memory=True, **there)} if low_memory else {})


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="a compressed model folder")],
    to: Annotated[
        str, typer.Option("--to", help="format: bitsandbytes, compressed-tensors, dense, gguf, gptq, peft")
    ] = "dense",
    out: Annotated[Path | None, out_option("<folder>-<format>, beside it")] = None,
    as_json: Json = False,
) -> None:
    """Write a compressed model in a format that other tools load; the result is read back before it is put in place."""
    from compress.export import export as write

    quiet_loading()
    place = folder.resolve()
    target = out if out is not None else place.with_name(f"{place.name}-{Path(to).name}")
    done = write(folder, to, target)
    line = escape(f"{target}: {done.bytes:,} bytes of {to} tensors; {done.note}")
    result({**asdict(done), "out": str(target)}, as_json, line)


@app.command()
@spoken(
    {
        "tokens": "--tokens",
        "parameters": "--params",
        "vocabulary": "--vocabulary",
        "bits": "--bits",
        "loss": "--loss",
        "dense_loss": "--dense-loss",
    }
)
def qid(
    model: Annotated[str | None, typer.Argument(help="model folder, or `builtin`; only its headers are read")] = None,
    params: Annotated[float | None, typer.Option(help="instead of a folder: parameters without embeddings")] = None,
    tokens: Annotated[float | None, typer.Option(help="tokens the model was trained on, such as 1.5e13")] = None,
    bits: Annotated[str, typer.Option(help="bits per weight, separated by commas")] = "2,3,4,8",
    loss: Annotated[float, typer.Option(help="acceptable loss, in nats per token")] = 0.2,
    vocabulary: Annotated[int | None, typer.Option(help="size of the vocabulary; default: the model's")] = None,
    dense_loss: Annotated[
        float | None, typer.Option(help="cross-entropy of the dense model, in nats per token")
    ] = None,
    fit: Annotated[Path | None, typer.Option(help="JSON lines of measured losses: refit the law on them first")] = None,
    as_json: Json = False,
) -> None:
    """Predict the loss that quantization costs from a model's size and training tokens, or refit the scaling law."""
    from compress.console import fit_lines, qid_table
    from compress.model.source import locate
    from compress.survey import survey
    from compress_evals import qid as laws

    if model is not None and params is not None:
        raise RecipeError("--params: the model folder already gives the number; give only one of the two")
    if fit is None and (tokens is None or (model is None and params is None)):
        raise RecipeError("a prediction needs a model folder or --params, and --tokens")
    counts = widths(bits)
    found = survey(locate(model)) if model is not None else {"non_embedding": params, "vocabulary": None, "sites": []}
    size = found["non_embedding"]
    value: dict[str, Any] = {}
    lines: list[Any] = []
    law = laws.PUBLISHED
    if fit is not None:
        points, key = laws.read_points(fit, size, tokens)
        compared = laws.refit(points)
        law = compared.power.law
        value["fit"] = {"bits": key, **asdict(compared)}
        lines += fit_lines(compared, key)
    if size is not None and tokens is not None:
        predicted = laws.predict(
            law,
            size,
            tokens,
            counts,
            loss=loss,
            vocabulary=vocabulary if vocabulary is not None else found["vocabulary"],
            dense_loss=dense_loss,
            mixture=any(row["expert"] for row in found["sites"]),
        )
        value |= asdict(predicted)
        lines += qid_table(predicted)
    result(value, as_json, *lines)


def widths(text: str) -> list[float]:
    """The bit widths of `2,3,4`; raises RecipeError for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(f"--bits: {text!r} is not a list of numbers such as 2,3,4") from error


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(help="show only this one")] = None,
    as_json: Json = False,
) -> None:
    """List every pass, or one of them, with its options, their defaults, and its source."""
    from compress.console import passes_table
    from compress.options import describe
    from compress.passes import PASSES, load_plugins

    load_plugins()
    if name is not None and name not in PASSES:
        raise RecipeError(f"no pass {name!r}{nearest(name, PASSES)}")
    rows = []
    for known, kind in sorted(PASSES.items()):
        text, _, source = (kind.__doc__ or "").partition("Source:")
        rows.append(
            {"name": known, "summary": " ".join(text.split()), "source": " ".join(source.split()),
             "options": describe(kind)}
        )  # fmt: skip
    chosen = [row for row in rows if name in (None, row["name"])]
    result({"passes": chosen}, as_json, passes_table(chosen))


def fail(message: str, code: int, once: bool = False) -> NoReturn:
    """Print one line on stderr and exit with `code`; with `once`, only the first process of torchrun prints it."""
    if not once or os.environ.get("RANK", "0") == "0":
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", markup=False)
    raise SystemExit(code)


@cache
def command() -> Any:
    """The command with all its subcommands and options, which take longer to put together than to read arguments."""
    return get_command(app)


def answered(debug: bool) -> int:
    """Run the command and return its exit code: after Ctrl-C 130, even if compiled code raised another exception."""
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ours = plain and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, press)
    try:
        return command()(standalone_mode=False) or 0
    except SystemExit as stop:  # typer exits with 1 when the reader of stdout has gone; 1 means that `diff` found one
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        return UNREAD
    except Exception:  # Ctrl-C while a tensor is read, for example, raises "could not determine the shape of object"
        if debug or not pressed:
            raise
        return INTERRUPTED
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def printable() -> None:
    """Make stdout accept every text: a closed one discards it, any other escapes what its encoding lacks."""
    if sys.stdout is None:  # `>&-`; otherwise the next file opened would get descriptor 1
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 it lives as long as the process
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command line; every error that a user can cause becomes one line and an exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    printable()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise tokenizers warns when lm-eval forks
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    code = 0
    try:
        code = answered(debug)
    except CompressError as error:
        if debug:
            raise
        fail(str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if debug or not out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:160]  # Python's MemoryError has no text
        fail(f"out of memory: {said}{'; --offload, fewer or shorter samples help' if sys.argv[1] == 'run' else ''}", 3)
    except UsageError as error:  # an unknown option, a missing argument
        fail(error.format_message(), 2, once=True)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # also what typer returns after Ctrl-C
        fail("interrupted; nothing is left half-written", code, once=True)
    raise SystemExit(code)


__all__ = ["app", "main"]
