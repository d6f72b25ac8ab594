"""The checks at the start of a run: places, devices, shapes, coverage, disk, calibration tokens, values.

All but `check_values`, which reads every weight, use only headers and the architecture. They raise CompressError
subclasses and change nothing, except that `free_place` removes what dead processes have left.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compress.artifact import is_artifact
from compress.calibration import Tokens, draw
from compress.errors import (
    ArtifactError,
    CalibrationError,
    PlanError,
    RecipeError,
    first_line,
    in_short,
    pass_on_memory,
    why,
)
from compress.model.anatomy import MISSED, Coverage, coverage
from compress.model.architecture import ignored
from compress.model.globs import matches
from compress.model.reshaped import walk_over
from compress.model.source import VOCABULARIES, Checkpoint
from compress.model.walk import Walk
from compress.partial import clear
from compress.passes.base import Pass, SitePass
from compress.recipe import Calibration, Recipe
from compress.stats import finite

FLOATS = ("F64", "F32", "F16", "BF16")


def usable(device: str) -> torch.device:
    """The torch device called `device`; raises RecipeError if it is not cpu, cuda or cuda:n, or not on this machine."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise RecipeError(f"--device: {device!r} is unknown; allowed: cpu, cuda, cuda:1 and so on")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device: {device!r} is not available on this machine: {first_line(error)}") from error


def placed(device: str) -> dict[str, Any]:
    """The options with which `load` puts a model on this device; raises RecipeError as `usable` does."""
    there = usable(device)
    return {} if there.type == "cpu" else {"device_map": str(there)}


def free_place(out: Path, source: Path, force: bool | None) -> Path:
    """The absolute output path, after the leftovers of killed processes there have been removed or undone.

    Raises RecipeError if something exists there that may not be replaced: anything without `force` (None: the caller
    has no such option), and with it anything but an empty folder or an artifact. Also raises it if the path would
    contain the source or lie inside it, and for a name that is not UTF-8, which safetensors cannot write.
    """
    out, source = absolute(out), source.resolve()
    if out == source or out in source.parents or source in out.parents:
        raise RecipeError(f"--out: {out} must not be, contain or lie in the model folder {source}")
    clear(out)
    if not out.exists():
        return out
    if not force:
        remedy = "" if force is None else ", or --force to replace an earlier result"
        raise RecipeError(f"--out: {out} exists; choose another folder{remedy}")
    if not out.is_dir() or (any(out.iterdir()) and not is_artifact(out)):
        raise RecipeError(f"--out: {out} is not an earlier result of Compress, and --force replaces only those")
    return out


def absolute(out: Path) -> Path:
    """The absolute output path; raises RecipeError if the system does not take it, or it is not UTF-8."""
    try:
        out = out.expanduser().resolve()
        out.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown ~user, a NUL
        raise RecipeError(f"--out: {why(error)}: {str(out)[:60]}") from error
    if os.fsencode(out) != str(out).encode("utf-8", "replace"):
        raise RecipeError(f"--out: {out} is not UTF-8; choose another name")
    return out


def check_disk(out: Path, source: Checkpoint) -> None:
    """Raise PlanError if the disk cannot hold an output as large as the source (a merged model has that size)."""
    there = next(parent for parent in out.parents if parent.exists())
    needed = max(source.nbytes(), sum(shard.stat().st_size for shard in set(source.files.values())))
    free = shutil.disk_usage(there).free
    if free < needed:
        raise PlanError(f"{there}: {free:,} bytes are free, but the output may take {needed:,}")


def check_tensors(walk: Walk, source: Checkpoint) -> None:
    """Raise ArtifactError if a parameter of the architecture is missing from the files or has another shape.

    Tensors that the architecture does not know are allowed, but not blocks beyond its number of blocks, unless the
    architecture declares that it ignores them.
    """
    prefix = f"{walk.path}."
    for name in walk.anatomy.layout.unknown:
        index = name.removeprefix(prefix).partition(".")[0]
        beyond = name.startswith(prefix) and index.isdigit() and int(index) >= len(walk.blocks)
        if beyond and not ignored(walk.model, name):
            raise ArtifactError(
                f"{source.path}: {name} belongs to block {index}, but config.json has only {len(walk.blocks)} blocks"
            )
    try:
        walk.anatomy.layout.check()
    except ArtifactError as error:
        raise ArtifactError(f"{source.path}: {error}") from error


def check_values(walk: Walk, source: Checkpoint) -> None:
    """Raise ArtifactError for the first tensor that holds NaN or infinite values, or a parameter that is not float.

    Reads every tensor of the model, so that a run does not fail on one after hours. Of a plain checkpoint, the values
    are checked in the same read that hashes the files.
    """
    unsound = source.unsound() if type(source) is Checkpoint else None
    layout = walk.anatomy.layout
    for name in (name for name in source.names() if name not in layout.unknown):
        slot = layout.slots.get(name)
        kind = source.headers[name].dtype
        if slot is not None and slot.parameter in layout.parameters and kind not in FLOATS:
            raise ArtifactError(f"{source.path}: {name} holds {kind}, but the model has floating-point numbers there")
        if name in unsound if unsound is not None else not finite(source.tensor(name)):
            raise ArtifactError(f"{source.path}: {name} holds NaN or infinite values")


def outline(walk: Walk, source: Checkpoint, recipe: Recipe) -> tuple[Walk, Checkpoint]:
    """The model in the shape that the recipe's reshaping passes will give it: names and sizes only, no values.

    Raises RecipeError if transformers cannot build it, and whatever a pass raises that cannot handle the model.
    """
    for i, step in enumerate(recipe.reshapes):
        try:
            source = step.outline(walk, source)
            walk = walk_over(source, walk)
            check_tensors(walk, source)
        except ArtifactError as error:
            reason = str(error).removeprefix(f"{source.path}: ")
            raise RecipeError(f"passes[{i}].{step.name}: transformers has no such model: {reason}") from error
    return walk, source


def plan(walk: Walk, recipe: Recipe) -> Coverage:
    """The coverage of a recipe over a model that already has the shape its reshaping passes give it.

    Raises RecipeError if a pass selects no site or cannot handle the shape or form of one, or if `accept.data_dir` is
    not a folder; PlanError if more is unreachable than the recipe's limit, which does not apply if no pass rewrites
    weights.
    """
    if recipe.accept and recipe.accept.data_dir is not None and not os.path.isdir(recipe.accept.data_dir):
        raise RecipeError(f"accept.data_dir: {recipe.accept.data_dir} is not a folder")
    covered = coverage(walk.anatomy, [step.sites for step in recipe.weight_passes])
    if recipe.weight_passes and covered.missed_share > recipe.limits.max_untouched:
        examples = ", ".join([name for name, (_, reason) in covered.untouched.items() if reason == MISSED][:2])
        raise PlanError(
            f"no pass can reach {covered.missed_share:.0%} of the block parameters, such as {examples}; "
            f"limits.max_untouched allows {recipe.limits.max_untouched:.0%}"
        )
    check_shapes(walk, recipe.passes)
    check_order(list(walk.anatomy.places), recipe.passes)
    return covered


def check_order(sites: Sequence[str], passes: Sequence[Pass]) -> None:
    """Raise RecipeError for the first pass that would get a site in a form (such as factored) it cannot rewrite."""
    for site in sites:
        form, by = "dense", "*"
        for i, step in enumerate(passes):
            if not isinstance(step, SitePass) or not matches(site, step.sites):
                continue
            if form and step.takes and form not in step.takes:
                hint = "; set factors: true" if form == "factored" and hasattr(step, "factors") else ""
                if form == "quantized" and by != "*" and len(by.split()) == 1:
                    hint = f'; leave it out, with sites: "!{by}"'
                raise RecipeError(
                    f"passes[{i}].{step.name}: takes a {' or '.join(step.takes)} weight; {site} is {form} by then{hint}"
                )
            form, by = step.leaves(form), step.sites


def check_shapes(walk: Walk, passes: Sequence[Pass]) -> None:
    """Raise RecipeError for the first pass that selects no site, or refuses the shape of one."""
    reachable = walk.anatomy.places
    for i, step in enumerate(passes):
        if not isinstance(step, SitePass):
            continue
        chosen = [place for name, place in reachable.items() if matches(name, step.sites)]
        if not chosen:
            example = next(iter(reachable), "nothing: this model has no site")
            raise RecipeError(
                f"passes[{i}].{step.name}.sites: {step.sites!r} selects no site; sites have names such as {example}"
            )
        for place in chosen:
            step.check(place.site, place.shape)
            if place.expert is not None and getattr(step, "inputs", "full") != "full":
                raise RecipeError(
                    f"passes[{i}].{step.name}.inputs: {place.site} is one of a stack of experts, whose input cannot be "
                    "rounded; choose other sites or inputs: full"
                )


def tokens_for(walk: Walk, folder: Path, recipe: Recipe) -> Tokens:
    """The calibration windows and the probe; only the probe if no pass needs data.

    Without a tokenizer, and if no pass needs one, the probe is random tokens. Raises CalibrationError if data is needed
    and not available, or if the model has no embedding for a token.
    """
    limit = longest_window(walk)
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        if recipe.needs_data():
            raise CalibrationError(f"{folder}: there is no tokenizer, and calibration needs one")
        vocabulary = int(walk.model.get_input_embeddings().num_embeddings)
        probe = torch.randint(0, vocabulary, (4, min(64, limit)), generator=torch.Generator().manual_seed(0))
        return Tokens(windows=(), probe_NT=probe, name="none (no tokenizer)", sha256="")
    if recipe.needs_data():
        drawn = draw(recipe.calibration, tokenizer, limit)
    else:
        found = draw(Calibration(data="text", length=min(256, limit)), tokenizer, limit, samples=0)
        drawn = Tokens(windows=(), probe_NT=found.probe_NT, name="none (data-free)", sha256="")
    return in_vocabulary(drawn, walk, str(folder))


def in_vocabulary(tokens: Tokens, walk: Walk, where: str) -> Tokens:
    """The same tokens; raises CalibrationError, naming `where`, if the model has no embedding for one of them."""
    vocabulary = int(walk.model.get_input_embeddings().num_embeddings)
    largest = int(max(ids.max() for ids in (*tokens.windows, tokens.probe_NT) if ids.numel()))
    if largest >= vocabulary:
        raise CalibrationError(
            f"{where}: the tokenizer yields token {largest}, but the vocabulary of the model has {vocabulary} entries"
        )
    return tokens


def longest_window(walk: Walk) -> int:
    """The longest window that a model takes, in tokens; 2048 if its config does not say."""
    limit = int(getattr(walk.model.config.get_text_config(), "max_position_embeddings", 2048))
    for module in walk.model.modules():  # RoBERTa's positions start after the padding index
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding) and table.padding_idx is not None:
            limit = min(limit, table.num_embeddings - table.padding_idx - 1)
    return limit


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a folder, or None if it has none; raises CalibrationError for one that cannot be loaded.

    A folder without a vocabulary has none: transformers would build an empty tokenizer of the model's type, and
    calibration would run on nothing but unknown tokens.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in VOCABULARIES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise anything from OSError to KeyError
        pass_on_memory(error)
        raise CalibrationError(f"{folder}: its tokenizer cannot be loaded: {in_short(error)}") from error
