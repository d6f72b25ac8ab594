"""The differences between two model folders, tensor by tensor; one tensor of each is in memory at a time.

Either may be an artifact or any other model folder. Tensors stored with the same bytes are not decoded. config.json is
compared by key, companion files (tokenizer, generation, licence) by hash. README.md and ledgers are not compared,
because they say how a model was made. What a reader would question: errors are relative to the first folder, so they
change if the two are swapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import METHOD, Artifact, is_artifact, keys
from compress.errors import ArtifactError
from compress.model.memory import give_back
from compress.model.source import Checkpoint, digest, display_name, locate
from compress.recipe import parse
from compress.sources import open_source
from compress.weights import Masked, Sum, Weight
from compress.writer import as_bytes, is_companion

AT_ONCE = 1 << 22  # entries compared at once
UNSAID = ("transformers_version", "_name_or_path", "quantization_config")  # config keys that do not define the model


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """A tensor that differs. `error` is |a - b| / |a|, `mask` the share of entries that both keep or both cut.

    `bits` are the stored bits a weight in each folder, `forms` what the tensor is stored as. A value is None where a
    folder has no such tensor, or where the two cannot be compared.
    """

    name: str
    where: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    forms: tuple[str | None, str | None]
    bits: tuple[float | None, float | None]
    error: float | None = None
    mask: float | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The differences between two folders; `same` counts the tensors that both store with the same bytes.

    `config` holds (a, b) by key where the two differ, `files` the sha256 of companion files that differ. If both are
    artifacts, `recipe`, `versions`, `calibration` and `errors` hold (a, b) by key too. None stands for what one lacks.
    """

    a: str
    b: str
    same: int
    tensors: tuple[TensorDifference, ...]
    bytes: tuple[int, int]
    config: Mapping[str, tuple[Any, Any]]
    files: Mapping[str, tuple[Any, Any]]
    recipe: Mapping[str, tuple[Any, Any]]
    calibration: Mapping[str, tuple[Any, Any]]
    versions: Mapping[str, tuple[Any, Any]]
    errors: Mapping[str, tuple[Any, Any]]

    @property
    def equal(self) -> bool:
        """Whether tensors, config, files, recipe and calibration are the same; versions may differ."""
        return not (self.tensors or self.config or self.files or self.recipe or self.calibration)


def compare(a: str | Path, b: str | Path, base: str | Path | None = None) -> Difference:
    """Compare two folders; deltas among them need their `base`.

    Raises ArtifactError for a folder that cannot be read, or for a delta without its base.
    """
    one, other = opened(locate(a), base), opened(locate(b), base)
    names = sorted({*one.names(), *other.names()})
    rows, same = [], 0
    for name in names:
        found = difference(name, one, other)
        same += found is None
        rows += [] if found is None else [found]
        give_back()
    told = provenance(one), provenance(other)
    return Difference(
        a=display_name(one.path), b=display_name(other.path), same=same, tensors=tuple(rows),
        bytes=(stored_bytes(one), stored_bytes(other)),
        config=apart(settings(one), settings(other)), files=by_key(companions(one), companions(other)),
        recipe=apart(*(parse(t["recipe"], "recipe") for t in told if t)) if all(told) else {},
        calibration=by_key(*(t["calibration"] if t else None for t in told)),
        versions=by_key(*(t["versions"] if t else None for t in told)),
        errors=by_key(*({n: row.get("output_error") for n, row in t["sites"].items()} if t else None for t in told)),
    )  # fmt: skip


def opened(folder: Path, base: str | Path | None) -> Checkpoint:
    """A folder read as the plain model it denotes."""
    if not is_artifact(folder):
        return open_source(folder, dequantize=True)
    found = Artifact(folder)
    if not found.is_delta:
        return found
    if base is None:
        raise ArtifactError(f"{folder}: is a delta of {found.pin_name}; give its base with --base")
    return Artifact(folder, locate(base))


def provenance(source: Checkpoint) -> dict[str, Any] | None:
    """The content of compress.json, if the source is an artifact that a recipe made; else None."""
    told = source.provenance if isinstance(source, Artifact) else None
    return told if told and "recipe" in told else None


def stored_bytes(source: Checkpoint) -> int:
    """The bytes of all stored tensors."""
    return sum(held.nbytes for held in source.stored_headers.values())


def sites_of(source: Checkpoint, name: str) -> list[str]:
    """The sites of an artifact that a plain tensor is made of; none if it is stored plainly."""
    return source.holders.get(name, []) if isinstance(source, Artifact) else []


def difference(name: str, one: Checkpoint, other: Checkpoint) -> TensorDifference | None:
    """How one tensor differs; None if both store it with the same bytes."""
    shapes = tuple(source.headers[name].shape if name in source.headers else None for source in (one, other))
    told: dict[str, Any] = {
        "name": name, "shapes": shapes,
        "forms": tuple(form_of(s, name) for s in (one, other)), "bits": tuple(bits_of(s, name) for s in (one, other)),
    }  # fmt: skip
    if None in shapes:
        return TensorDifference(**told, where="only in A" if shapes[1] is None else "only in B")
    if stored_alike(name, one, other):
        return None
    if shapes[0] != shapes[1]:
        return TensorDifference(**told, where="another shape")
    error = relative_error(one.tensor(name), other.tensor(name))
    return TensorDifference(
        **told, where="different" if error else "same values, stored differently", error=error,
        mask=mask_agreement(name, one, other),
    )  # fmt: skip


def stored_alike(name: str, one: Checkpoint, other: Checkpoint) -> bool:
    """Whether both store a tensor in the same form and with the same bytes."""
    ours, theirs = sites_of(one, name), sites_of(other, name)
    if ours != theirs:
        return False
    if not (isinstance(one, Artifact) and isinstance(other, Artifact) and ours):
        if one.headers[name] != other.headers[name]:
            return False
        return same_bytes(one.tensor(name), other.tensor(name))
    for site in ours:
        if one.specs[site]["tree"] != other.specs[site]["tree"]:
            return False
        pair = one.stored(site), other.stored(site)
        if pair[0].keys() != pair[1].keys() or not all(same_bytes(t, pair[1][key]) for key, t in pair[0].items()):
            return False
    return True


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype and shape and are equal bit for bit."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(as_bytes(one), as_bytes(other))


def form_of(source: Checkpoint, name: str) -> str | None:
    """The form a tensor is stored in: the name of its expression, or its dtype; None if there is no such tensor."""
    sites = sites_of(source, name)
    if isinstance(source, Artifact) and sites:
        return ", ".join(dict.fromkeys(str(source.specs[site].get("name", "")) for site in sites))
    return source.headers[name].dtype if name in source.headers else None


def bits_of(source: Checkpoint, name: str) -> float | None:
    """Stored bits a weight; tensors that several sites share count for each of them."""
    if name not in source.headers:
        return None
    sites = sites_of(source, name)
    entries = prod(source.headers[name].shape) or 1
    if not (isinstance(source, Artifact) and sites):
        return 8 * source.headers[name].nbytes / entries
    held = (key for site in sites for key in keys(site, source.specs[site]).values())
    return 8 * sum(source.stored_headers[key].nbytes for key in held) / entries


def relative_error(one: Tensor, other: Tensor) -> float:
    """|a - b| / |a|, accumulated in float64 in chunks; infinite if a is 0 and b is not."""
    apart = whole = 0.0
    for a, b in zip(one.reshape(-1).split(AT_ONCE), other.reshape(-1).split(AT_ONCE), strict=True):
        apart += float((a.double() - b.double()).square().sum())
        whole += float(a.double().square().sum())
    return (apart / whole) ** 0.5 if whole else float("inf") if apart else 0.0


def mask_agreement(name: str, one: Checkpoint, other: Checkpoint) -> float | None:
    """The share of entries that both masks keep or both cut; None unless both have a mask of the same shape."""
    masks = []
    for source in (one, other):
        sites = sites_of(source, name)
        if len(sites) != 1 or not isinstance(source, Artifact):
            return None
        masks.append(mask_of(source.expression(sites[0])))
    if masks[0] is None or masks[1] is None or masks[0].shape != masks[1].shape:
        return None
    return float((masks[0] == masks[1]).float().mean())


def mask_of(weight: Weight) -> Tensor | None:
    """The mask of an expression, or of the first term of a sum that has one; None for any other form.

    A mask behind a permutation does not count, because it is over reordered inputs.
    """
    match weight:
        case Masked(_, mask_OI):
            return mask_OI
        case Sum(terms):
            return next((mask for term in terms if (mask := mask_of(term)) is not None), None)
        case _:
            return None


def settings(source: Checkpoint) -> dict[str, Any]:
    """The fields of config.json that define the model, and the cache option of an artifact.

    How weights are stored is left out, because that is compared tensor by tensor.
    """
    held = {key: value for key, value in source.config.items() if key not in UNSAID}
    told = source.config.get("quantization_config")
    ours = isinstance(told, dict) and told.get("quant_method") == METHOD
    return {**held, "kv": told.get("kv")} if told and ours else held


def companions(source: Checkpoint) -> dict[str, str]:
    """The sha256 of each companion file, including those that a delta shares with its base."""
    names = sorted(file.name for file in source.path.iterdir() if is_companion(file.name) and file.is_file())
    left = source.provenance.get("base_files", {}) if isinstance(source, Artifact) and source.is_delta else {}
    return {**left, **{name: digest(source.path / name) for name in names}}


def apart(one: Any, other: Any, at: str = "") -> dict[str, tuple[Any, Any]]:
    """(a, b) by dotted path where plain data differs, None for what one lacks.

    Two mappings or lists that share no key are given whole.
    """
    if one == other:
        return {}
    parts = [dict(enumerate(value)) if isinstance(value, list) else value for value in (one, other)]
    alike = type(one) is type(other) and isinstance(one, (dict, list))
    if not alike or (at and not parts[0].keys() & parts[1].keys()):
        return {at: (one, other)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys((*parts[0], *parts[1])):
        found |= apart(parts[0].get(key), parts[1].get(key), f"{at}.{key}" if at else str(key))
    return found


def by_key(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> dict[str, tuple[Any, Any]]:
    """(a, b) by key where two mappings differ, None for what one lacks; empty if either mapping is None."""
    if one is None or other is None:
        return {}
    either = dict.fromkeys((*one, *other))
    return {key: (one.get(key), other.get(key)) for key in either if one.get(key) != other.get(key)}
