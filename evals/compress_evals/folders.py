"""Evaluate model folders: load each, ask the suite, compare with the dense base, and write the report.

The dense base is measured once for all of them. Peak memory is two models: fidelity needs both at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import compress
from compress.artifact import Artifact, base_of, check_base, is_artifact, recorded_base
from compress.errors import ArtifactError, RecipeError
from compress.model.source import BUILTIN, Checkpoint, locate
from compress.plan import usable
from compress_evals.comparison import compare
from compress_evals.fidelity import measure_fidelity
from compress_evals.report import html, markdown
from compress_evals.results import Results, save
from compress_evals.run import evaluate

Progress = Callable[[str], None]
SHORTEST = 4000  # characters of a text to measure on: some windows to resample


def evaluate_folders(
    paths: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    delta_base: str | Path | None = None,
    limit: int | None = None,
    margin: float = 0.05,
    seed: int = 0,
    text: str | None = None,
    out: Path | None = None,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> list[Results]:
    """The results of the dense base, then of each folder, compared with it.

    `base` defaults to `builtin` where the first artifact was made from it; `delta_base` is what deltas among the
    folders are added to, if that is not `builtin`. `text` is what bits per byte and KL are
    measured on, by default the built-in prose. With `out`, results, samples, `report.md` and `report.html` are
    written there. Raises ArtifactError for folders that cannot be read or compared, RecipeError without a base.
    """
    folders = [locate(path) for path in paths]
    source = base if base is not None else recorded_base(folders[0])
    say = on_progress or (lambda text: None)
    names = distinct_names(folders, model_name(source))
    check_base(folders, locate(source))
    if text is not None and len(text) < SHORTEST:
        raise RecipeError(f"--text: {len(text)} characters are too few to measure on; give at least {SHORTEST}")
    usable(device)
    below = [base_of(folder, None if delta_base is None else locate(delta_base), BUILTIN) for folder in folders]
    dense_model, tokenizer = opened(locate(source), device)
    if out is not None:
        make(out)
    dense = evaluate(
        dense_model, tokenizer, name=model_name(source), description=describe(locate(source)), limit=limit, seed=seed,
        on_progress=lambda text: say(f"{model_name(source)}: {text}"),
    )  # fmt: skip
    results = [dense]
    for name, folder, under in zip(names, folders, below, strict=True):
        model = compress.load(folder, base=under).to(usable(device))
        found = evaluate(
            model, tokenizer, name=name, description=describe(folder), limit=limit, seed=seed,
            on_progress=lambda text, name=name: say(f"{name}: {text}"),  # type: ignore[misc]
        )  # fmt: skip
        say(f"{name}: fidelity")
        versus = compare(
            dense,
            found,
            measure_fidelity(dense_model, model, tokenizer, text=text, seed=seed),
            margin=margin,
            seed=seed,
        )
        results.append(found.model_copy(update={"vs": versus}))
        del model  # before the next one is loaded
    if out is not None:
        write(results, out)
    return results


def opened(folder: Path, device: str) -> tuple[Any, Any]:
    """The model and tokenizer of a folder."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error
    return compress.load(folder).to(usable(device)), tokenizer


def describe(folder: Path) -> dict[str, Any]:
    """What a folder says of itself: bytes of its shards, and for an artifact how it was made."""
    if not is_artifact(folder):
        checkpoint = Checkpoint(folder)
        size = sum(checkpoint.tensor(name).nbytes for name in checkpoint.names())
        return {"bytes_on_disk": size, "sha": joined(checkpoint.digests())}
    made = Artifact(folder).provenance
    return {
        "sha": joined({n: sha for n, sha in made["files"].items() if n.endswith(".safetensors")}),
        "bytes_on_disk": made["sizes"]["bytes"],
        "bits_per_weight": made["sizes"]["bits_per_weight"],
        "recipe": made["recipe"],
        "calibration": made["calibration"],
        "parameters": sum(size for size, _ in made["untouched"].values())
        + sum(matrix_size(made["tensors"][f"{site}.weight"]) for site in made["sites"]),
    }


def matrix_size(shape: Sequence[int]) -> int:
    """Entries of a matrix."""
    return shape[0] * shape[1]


def joined(digests: dict[str, str]) -> str:
    """One identity of several shards: the sha256 of their names and sha256s."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def distinct_names(folders: Sequence[Path], base: str) -> list[str]:
    """Folder names, with the parent's where two are alike; raises RecipeError if that is not enough."""
    short = [folder.resolve().name for folder in folders]
    long = [f"{folder.resolve().parent.name}-{folder.resolve().name}" for folder in folders]
    names = [n if [*short, base].count(n) == 1 else whole for n, whole in zip(short, long, strict=True)]
    if len({*names, base}) <= len(names):
        raise RecipeError(f"folders to evaluate need distinct names, got {', '.join([base, *names])}")
    return names


def make(out: Path) -> None:
    """Create the output folder; raises RecipeError if that cannot be done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--out: {out} cannot be created: {error.strerror}") from error


def model_name(source: str | Path) -> str:
    """How the dense model is called in tables."""
    return "builtin" if str(source) == "builtin" else Path(source).name


def fidelity_line(result: Results) -> str:
    """KL, agreement and bits per byte of one compared result, in a sentence."""
    found = result.vs.fidelity if result.vs else None
    if found is None:
        return "fidelity not measured"
    over = f", over the {found.top} likeliest tokens and the rest: a lower bound" if found.top else ""
    return (
        f"on {found.tokens} tokens of text: KL {found.kl.value:.4f} nats "
        f"({found.kl.low:.4f} to {found.kl.high:.4f}{over}), "
        f"same best token {100 * found.top1:.1f} %, bits per byte {found.dense_bits_per_byte:.3f} -> "
        f"{found.compressed_bits_per_byte:.3f} (not a quality metric)"
    )


def write(results: Sequence[Results], out: Path) -> None:
    """Write every result with its samples, and the two reports."""
    for result in results:
        save(result, out / result.model.name.replace("/", "-"))
    (out / "report.md").write_text(markdown(results), encoding="utf-8")
    (out / "report.html").write_text(html(results), encoding="utf-8")
