"""Evaluates model folders: runs the suite on each model, compares it with the dense base, and writes the report.

The dense base is measured once for all of them. With a cache, nothing that was measured before is measured again, also
in later evaluations, and a model whose measurements are all cached is not loaded. With a cache, one model is in memory
at a time; without one, and while generation is timed, two.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import compress
from compress.artifact import Artifact, base_of, check_base, is_artifact, recorded_base
from compress.errors import ArtifactError, RecipeError, first_line
from compress.model.source import BUILTIN, Checkpoint, digest, display_name, locate
from compress.plan import usable
from compress_evals import batching, references
from compress_evals.batching import BatchSize
from compress_evals.cache import Cache
from compress_evals.comparison import Flipped, compare
from compress_evals.conditions import Condition, check_asked
from compress_evals.examples import examples, shown, spoken
from compress_evals.fidelity import Fidelity, measure_fidelity
from compress_evals.noise import measure_noise, samples
from compress_evals.progress import Meter
from compress_evals.questions import Exam, Questions, hashed, prepare, within
from compress_evals.references import Held
from compress_evals.report import html, markdown
from compress_evals.results import Results, Speed, save
from compress_evals.run import measure
from compress_evals.subject import Subject
from compress_evals.suite import FACTS, find

Progress = Callable[[str], None]
GENERATED = {"prompt": 64, "new": 128, "runs": 5}  # as in `compress bench --generate`
SHORTEST = 4000  # characters a fidelity text must have, so that there are windows to resample
SETTINGS = ("config.json", "generation_config.json")  # files besides the weights that affect a model's answers


@dataclass(frozen=True, kw_only=True)
class Session:
    """The settings shared by all models of one evaluation; `again` are the questions of the noise measurement.

    Examples of flips are collected only if `examples` is set: they take time, and only the written files show them.
    """

    exam: Exam
    cache: Cache | None
    meter: Meter
    again: Sequence[Questions]
    examples: bool
    text: str | None
    margin: float
    seed: int
    speed: bool


def evaluate_folders(
    paths: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    delta_base: str | Path | None = None,
    suite: str = FACTS.name,
    data_dir: Path | None = None,
    online: bool = False,
    only: Sequence[str] | None = None,
    limit: int | None = None,
    margin: float = 0.05,
    seed: int = 0,
    text: str | None = None,
    out: Path | None = None,
    device: str = "cpu",
    batch_size: BatchSize = "auto",
    cache: Path | None = None,
    fresh: bool = False,
    noise: int = 0,
    speed: bool = False,
    chat_template: bool = False,
    conditions: Sequence[Condition] = (),
    on_progress: Progress | None = None,
    meter: Meter | None = None,
) -> list[Results]:
    """The results of the dense base, then those of each folder, each compared with the base.

    `base` defaults to `builtin` if the first artifact was made from it; `delta_base` is the model that deltas among the
    folders are added to, if it is not `builtin`. `suite`, `only`, `limit`, `data_dir`, `online` and `chat_template`
    select the questions (see `questions.prepare`); `text` is the text for bits per byte and KL, by default the built-in
    prose. `batch_size` is a number, or `auto` for the largest that fits, up to 64 on a CPU; if memory runs out, all
    models are evaluated again at half of it. `noise` questions per task are asked of the dense model a second time,
    `speed` times generation. `conditions` are not tested here, only checked before the evaluation: each must apply to
    something that can be asked. With `out`, results, samples, examples of flips, `report.md` and `report.html` are
    written there. All measurements are stored in `cache`, by default OUT/cache, and read from it unless `fresh`.
    Raises ArtifactError for folders that cannot be read or compared, RecipeError if there is no base or no question, or
    if `out` or `cache` lies in a model folder.
    """
    if not paths:
        raise RecipeError("folders: name at least one to evaluate")
    source = base if base is not None else recorded_base(locate(paths[0]))
    named = checked([locate(path) for path in paths], source, delta_base, text)
    apart([folder for _, folder, _ in named], {"--out": out, "--cache": cache})
    usable(device)
    exam = prepare(
        find(suite), tokenizer_of(locate(source)), only=only, limit=limit, seed=seed, data_dir=data_dir, online=online,
        chat_template=chat_template,
    )  # fmt: skip
    check_asked(conditions, exam)
    if out is not None:
        make(out)
    meter = meter or Meter(on_progress)
    place = cache if cache is not None else None if out is None else out / "cache"
    store = None if place is None else Cache(place, fresh=fresh, say=meter.note)
    dense = subject(model_name(source), locate(source), None, device)
    exam = within(exam, dense.known(exam, store).max_length)
    check_asked(conditions, exam)  # again, because tasks too long for the model have now been dropped
    session = Session(
        exam=exam,
        cache=store,
        meter=meter,
        again=samples(exam, noise) if noise else (),
        examples=out is not None,
        text=text,
        margin=margin,
        seed=seed,
        speed=speed,
    )
    others = [subject(*found, device) for found in named]
    size = batching.find(dense, exam, session.cache) if batch_size == "auto" else batch_size
    results, fitted = batching.halving(size, partial(ask_all, session, dense, others), meter.note)
    if fitted != size:
        why = f"batch size {fitted}, because {size} ran out of memory"
        results = [noted(found, why) for found in results]
    if out is not None:
        write(results, out)
    return results


def checked(
    folders: Sequence[Path], source: str | Path, delta_base: str | Path | None, text: str | None
) -> list[tuple[str, Path, Path | None]]:
    """For each folder its name, its path and the base of its delta, if it is one; nothing is loaded.

    Raises RecipeError for names that are not distinct or a text that is too short, ArtifactError for a folder that was
    made from another base.
    """
    names = distinct_names(folders, model_name(source))
    check_base(folders, locate(source))
    if text is not None and len(text) < SHORTEST:
        raise RecipeError(f"--text: {len(text)} characters are too few to measure on; give at least {SHORTEST}")
    below = [base_of(folder, None if delta_base is None else locate(delta_base), BUILTIN) for folder in folders]
    return list(zip(names, folders, below, strict=True))


def apart(models: Sequence[Path], places: dict[str, Path | None]) -> None:
    """Raise RecipeError, naming the option, for an output in a model folder: `verify` would refuse that folder then."""
    for option, place in places.items():
        for model in models:
            if place is not None and model.resolve() in (place.resolve(), *place.resolve().parents):
                raise RecipeError(
                    f"{option}: {place} must not be the model folder {model} or inside it; write it elsewhere"
                )


def ask_all(session: Session, dense: Subject, others: Sequence[Subject], size: int) -> list[Results]:
    """The results of the dense model and of all others, compared with it, at one batch size."""
    session.meter.restart()
    session.meter.expect(session.exam.tasks, 1 + len(others))
    session.meter.expect(session.again)
    first = ask_dense(session, dense, size)
    held = None
    if session.cache is not None:
        held = references.hold(dense, session.exam, session.cache, session.text)
        dense.release()
    results = [first]
    for other in others:
        results.append(ask_other(session, dense, first, held, other, size))
        other.release()  # before the next one is loaded
    dense.release()
    return results


def ask_dense(session: Session, dense: Subject, size: int) -> Results:
    """The dense model's results, with its noise floor and, for the examples, its generated wrong answers."""
    results = measure(dense, session.exam, size, session.cache, session.meter)
    if session.examples:
        results = spoken(dense, results, session.exam, session.cache)
    noise = measure_noise(dense, results, session.exam, session.again, session.cache, session.meter)
    return results.model_copy(update={"noise": noise})


def ask_other(
    session: Session, dense: Subject, first: Results, held: Held | None, other: Subject, size: int
) -> Results:
    """A compressed model's results, compared with those of the dense model."""
    found = measure(other, session.exam, size, session.cache, session.meter)
    flipped: dict[str, Flipped] = {}
    if session.examples:
        chosen = shown(first, found)
        ids = {name: (*lost, *gained) for name, (lost, gained) in chosen.items()}
        found = spoken(other, found, session.exam, session.cache, ids)
        flipped = examples(first, found, chosen, session.exam)
    session.meter.say(f"{other.name}: fidelity")
    versus = compare(
        first,
        found,
        distance(session, dense, held, other),
        margin=session.margin,
        seed=session.seed,
        examples=flipped,
        speed=timed(dense, other) if session.speed else None,
    )
    return found.model_copy(update={"vs": versus})


def distance(session: Session, dense: Subject, held: Held | None, other: Subject) -> Fidelity:
    """The fidelity of a model to the dense one, which is loaded only if its log-probabilities are not held on disk."""
    if held is None or session.cache is None:
        return measure_fidelity(dense.model, other.model, session.exam.tokenizer, text=session.text, seed=session.seed)
    return references.fidelity(held, other, session.exam, session.cache, session.seed)


def timed(dense: Subject, other: Subject) -> Speed:
    """Time greedy generation with both models in turn."""
    from compress.runtime.bench import measure_generation

    first, second = measure_generation({"dense": dense.model, "compressed": other.model}, **GENERATED)
    return Speed(
        **GENERATED,
        dense=first.tokens_per_second.median,
        compressed=second.tokens_per_second.median,
        ratio=second.speedup.median,
        low=second.speedup.low,
        high=second.speedup.high,
    )


def noted(results: Results, why: str) -> Results:
    """The results with a note added, both to them and to their comparison."""
    versus = results.vs and results.vs.model_copy(update={"notes": (*results.vs.notes, why)})
    return results.model_copy(update={"notes": (*results.notes, why), "vs": versus})


def subject(name: str, folder: Path, under: Path | None, device: str) -> Subject:
    """The model of a folder, not loaded yet; `under` is the base that a delta is added to."""

    def load() -> Any:
        return compress.load(folder, base=under).to(usable(device))

    made_of = [fingerprint(folder), None if under is None else fingerprint(under)]
    return Subject(name, load, device=device, description=describe(folder), identity=hashed(made_of))


def fingerprint(folder: Path) -> str:
    """The hash of all files of a folder that determine its model's answers; its metadata is left out."""
    files = sorted(folder.glob("*.safetensors")) + [folder / name for name in SETTINGS if (folder / name).is_file()]
    return hashed([[path.name, digest(path)] for path in files])


def opened(folder: Path, device: str) -> tuple[Any, Any]:
    """The model and tokenizer of a folder."""
    tokenizer = tokenizer_of(folder)
    return compress.load(folder).to(usable(device)), tokenizer


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a folder; raises ArtifactError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}: its tokenizer cannot be loaded: {first_line(error)}") from error


def describe(folder: Path) -> dict[str, Any]:
    """The recorded facts about a folder: bytes and hash of its shards, and for an artifact how it was made."""
    if not is_artifact(folder):
        checkpoint = Checkpoint(folder)
        return {"bytes_on_disk": checkpoint.nbytes(), "sha": joined(checkpoint.digests())}
    made = Artifact(folder).provenance
    return {
        "sha": joined({n: sha for n, sha in made["files"].items() if n.endswith(".safetensors")}),
        "bytes_on_disk": made["sizes"]["bytes"],
        "bits_per_weight": made["sizes"]["bits_per_weight"],
        "recipe": made["recipe"],
        "calibration": made["calibration"],
        "parameters": sum(map(prod, made["tensors"].values())),
    }


def joined(digests: dict[str, str]) -> str:
    """One hash for several shards: the sha256 of their names and sha256s."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def distinct_names(folders: Sequence[Path], base: str) -> list[str]:
    """Folder names, prefixed with the parent's name where two are equal; raises RecipeError if that is not enough."""
    short = [display_name(folder) for folder in folders]
    long = [f"{folder.resolve().parent.name}-{folder.resolve().name}" for folder in folders]
    names = [n if [*short, base].count(n) == 1 else whole for n, whole in zip(short, long, strict=True)]
    if len({*names, base}) <= len(names):
        raise RecipeError(f"folders to evaluate need distinct names, got {', '.join([base, *names])}")
    return names


def make(out: Path) -> None:
    """Create the output folder; raises RecipeError if it cannot be created or written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # fail now, not after the whole evaluation
    except OSError as error:
        raise RecipeError(f"--out: {out} cannot be written: {error.strerror}") from error


def model_name(source: str | Path) -> str:
    """The name of the dense model in tables."""
    return "builtin" if str(source) == "builtin" else Path(os.path.abspath(Path(source).expanduser())).name


def fidelity_line(result: Results) -> str:
    """One line with the KL, top-1 agreement and bits per byte of a compared result."""
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
    """Write every result with its samples, and the two reports; raises RecipeError if that fails."""
    try:
        for result in results:
            save(result, out / result.model.name.replace("/", "-"))
        (out / "report.md").write_text(markdown(results), encoding="utf-8")
        (out / "report.html").write_text(html(results), encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--out: {out} cannot be written: {error.strerror}; all answers are in the cache") from error
