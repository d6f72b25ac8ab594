"""Imports LoRA adapters trained with PEFT as deltas of their base, without loss.

An adapter is a low-rank delta, so its factors are stored unchanged, and all commands that take a delta (load, apply,
merge, serve, export) then work with it. No forward pass is run.
Not here: reading the adapter's files (`lora.py`), and writing a delta as an adapter (`compress/export/peft.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from compress.adapters.lora import REMEDY, WEIGHTS, Adapter, is_adapter
from compress.artifact import Artifact, fingerprint, is_artifact, verify
from compress.card import card
from compress.errors import ArtifactError, RecipeError
from compress.frontmatter import carried
from compress.identity import machine, versions
from compress.model.anatomy import Anatomy, Place, coverage
from compress.model.architecture import without_code
from compress.model.family import TESTED
from compress.model.reshaped import FLOATS
from compress.model.source import ADAPTER, Checkpoint, digest, display_name, dtype_of, locate
from compress.model.walk import BASE, Walk
from compress.plan import check_tensors, free_place
from compress.shards import SHARD_SIZE, Entry
from compress.sources import open_source
from compress.weights import Dense, External, Product, Sum
from compress.writer import Stored, writing

RECIPE = "# imported from a LoRA adapter; no pass was run\npasses: []\n"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written to `out`: the bytes of its tensors, how many matrices have factors, and how many tensors are
    `whole`; `parameters` counts the entries of all factors."""

    out: Path
    bytes: int
    matrices: int
    parameters: int
    whole: int


@torch.no_grad()
def import_adapter(adapter: str | Path, base: str | Path, out: str | Path, *, force: bool = False) -> Written:
    """Write the LoRA adapter in the folder `adapter` as a delta of `base` into the folder `out`.

    The factors keep their dtype and every bit, except that scale * B is rounded to float32 where alpha / r is not a
    power of two. Tensors that the adapter holds whole (biases, saved modules) are stored whole. Reads the headers of
    the base, and all of its bytes once for the fingerprint.

    Raises ArtifactError if the folder is not a LoRA adapter, does not fit this base, or is more than W + scale * B A;
    RecipeError if the base is compressed or quantized, or if `out` exists and `force` is not given. `out` is then left
    as it was.
    """
    root = locate(base)
    found = opened(Path(adapter))
    target = free_place(free_place(Path(out), found.folder, force), root, force)
    if is_artifact(root):
        raise RecipeError(f"--base: {root} is a compressed model; `compress attach` makes the adapter a part of it")
    source = open_source(root)
    if source.decoded_from:
        raise RecipeError(f"--base: {root} is stored as {source.decoded_from}; a base must be unquantized")
    walk = Walk(source.config, source, dtype_of(source.config), torch.device("cpu"))
    check_tensors(walk, source)
    places = placed(found, walk.anatomy)
    plain = whole(found, walk.anatomy, source)
    with writing(target, SHARD_SIZE) as writer:
        sites = {place.site: stored(found, module, place, source) for module, place in places.items()}
        packed = writer.pack(sites, plain)
        rows = {site: row(held, packed.nbytes(site, held.weight)) for site, held in sites.items()}
        writer.write(packed)
        pin = {"name": display_name(root), "sha256": fingerprint(source)}
        said = told(found, source, walk, rows, pin, writer.size)
        text = card(said, said=carried(found.folder))
        config = without_code(source.config)
        writer.describe(root, config, said, text, pin=pin, base=root, over=found.folder)
        verify(writer.partial, root)
        writer.commit()
    return Written(out=target, bytes=writer.size, matrices=len(places), parameters=found.parameters, whole=len(plain))


def opened(folder: Path) -> Adapter:
    """The adapter in a folder; raises ArtifactError if there is none."""
    if not is_adapter(folder):
        raise ArtifactError(f"no adapter at {str(folder)!r}; give a folder with {ADAPTER}, as PEFT saves it")
    return Adapter(folder)


def placed(adapter: Adapter, anatomy: Anatomy) -> dict[str, Place]:
    """The site of each module that has factors; raises ArtifactError if the base has none, or one of another shape."""
    single = {p.module: p for p in anatomy.places.values() if p.expert is None and p.rows is None}
    for module in adapter.pairs:
        if module not in single:
            reason = "is not a linear layer inside a block" if module in anatomy.modules else "does not exist"
            raise ArtifactError(f"{adapter.folder}: adapts {module}, which {reason} in the base")
        shape, wanted = adapter.shape(module), single[module].shape
        if shape != wanted:
            raise ArtifactError(f"{adapter.folder}: {module} is {list(shape)}, in the base {list(wanted)}")
    return {module: single[module] for module in sorted(adapter.pairs)}


def whole(adapter: Adapter, anatomy: Anatomy, base: Checkpoint) -> list[Entry]:
    """The tensors that an adapter holds whole, under the names that the base has for them.

    Raises ArtifactError for one that the base does not have, or has in another shape or as another kind of number, that
    another tensor is tied to (PEFT leaves that one as it was), or that the base holds compressed.
    """
    names = {slot.parameter: name for name, slot in anatomy.layout.slots.items() if slot.expert is None}
    entries = []
    for path, key in adapter.whole.items():
        name, held = names.get(path), adapter.held(path)
        if name is None or base.headers[name].shape != held.shape:
            has = list(base.headers[name].shape) if name else "nothing of that name, or tied to another"
            raise ArtifactError(f"{adapter.folder}: holds {path} of {list(held.shape)}, the base {has}")
        if path in anatomy.layout.tied.values():
            raise ArtifactError(f"{adapter.folder}: holds {path}, to which the base ties another tensor; {REMEDY}")
        if isinstance(base, Artifact) and name in base.holders:
            raise ArtifactError(f"{adapter.folder}: holds {path} whole, which the base holds compressed")
        dtype = base.headers[name].dtype
        if (held.dtype in FLOATS) != (dtype in FLOATS):
            raise ArtifactError(f"{adapter.folder}: holds {path} in {held.dtype}, the base in {dtype}")
        like = base.headers[name]._replace(dtype=held.dtype)
        entries.append(Entry(name=name, make=partial(adapter.tensor, key), **like._asdict(), nbytes=like.nbytes))
    return entries


def stored(adapter: Adapter, module: str, place: Place, base: Checkpoint) -> Stored:
    """The expression of a site: the base's matrix plus the product of the factors."""
    left_OR, right_RI = adapter.factors(module)
    matrix = base.tensor(place.tensor)
    turned = place.transposed != place.turned
    w_OI = External(matrix.T if turned else matrix, BASE, place.tensor)
    weight = Sum((w_OI, Product(Dense(left_OR), Dense(right_RI))))
    return Stored(weight=weight, tensor=place.tensor, transposed=turned)


def row(held: Stored, nbytes: int) -> dict[str, Any]:
    """The record of a site in compress.json; nothing is lost, so its error is 0."""
    return {
        "weight": held.weight.describe(), "bytes": nbytes, "weight_error": 0.0, "output_error": None, "tokens": 0,
        "fallbacks": [], "starved": [],
    }  # fmt: skip


def told(
    adapter: Adapter, base: Checkpoint, walk: Walk, rows: dict[str, Any], pin: dict[str, str], size: int
) -> dict[str, Any]:
    """compress.json without the hashes of what was written."""
    family = str(base.config.get("model_type"))
    covered = coverage(walk.anatomy, ["*"])
    names = {walk.anatomy.places[site].tensor for site in rows}
    matrices = sum(covered.touched.values())
    here = machine(torch.device("cpu"))
    untouched = {**covered.untouched, **{n: (c, "not adapted") for n, c in covered.touched.items() if n not in names}}
    return {
        "versions": versions(),
        "source": {
            "name": display_name(adapter.folder), "family": family, "tested_family": family in TESTED,
            "sha256": base.digests(),  # the dense model to compare with is the base
        },
        "adapter": {"name": display_name(adapter.folder), "sha256": digest(adapter.folder / WEIGHTS)},
        "machine": {name: here[name] for name in ("threads", "cpu", "device")},
        "recipe": RECIPE,
        "calibration": {"name": "none", "sha256": sha256().hexdigest(), "tokens": 0},
        "sizes": {
            "bytes": size, "source_bytes": base.nbytes(),
            "bits_per_weight": 8 * sum(r["bytes"] for r in rows.values()) / matrices,
        },
        "probe": {"tokens": 0, "kl": 0.0},
        "base": pin,
        "cast": {},
        "sites": rows,
        "untouched": untouched,
        "tensors": base.shapes(),
    }  # fmt: skip


__all__ = ["Written", "import_adapter"]
