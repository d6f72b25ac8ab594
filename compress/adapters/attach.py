"""Makes a LoRA adapter, trained on a compressed model, a part of that model: one more low-rank term at each site.

Masks, codes and factors keep every bit. The result is an artifact like any other: the new term is verified, evaluated,
loaded and run in the same way as the corrections of `repair`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from compress.adapters import Written, opened, placed, row, whole
from compress.adapters.lora import WEIGHTS, Adapter
from compress.artifact import Artifact, tensor_of, verify
from compress.card import card
from compress.errors import RecipeError, UnsupportedWeight
from compress.frontmatter import carried
from compress.identity import versions
from compress.model.anatomy import Place
from compress.model.source import digest, display_name, locate
from compress.model.walk import Walk
from compress.picture import picture
from compress.plan import free_place
from compress.runtime.kv import check as check_cache
from compress.runtime.latent import is_factored
from compress.shards import SHARD_SIZE, Entry
from compress.verification import check_runtime
from compress.weights import Dense, Product, Sum, Weight
from compress.writer import PICTURE, Stored, writing

FORGOTTEN = ("files", "sha256")  # fields of compress.json that are computed again
NOTE = "# a LoRA adapter, {name} ({rank}), was attached afterwards\n"


@torch.no_grad()
def attach(artifact: str | Path, adapter: str | Path, out: str | Path, *, force: bool = False) -> Written:
    """Write the compressed model in the folder `artifact` with a LoRA adapter as part of it to the folder `out`.

    The adapter must have been trained on that model (see `compress.adapters.training`), which cannot be checked. The KL
    on the probe is no longer known afterwards and is left out; `compress eval` measures what was regained.

    Raises ArtifactError if `artifact` is not an artifact or `adapter` no LoRA adapter that fits it; RecipeError for a
    delta, or if `out` exists and `force` is not given; UnsupportedWeight for a site whose input is quantized, because
    the adapter's input was not.
    """
    path, found = locate(artifact), opened(Path(adapter))
    target = free_place(free_place(Path(out), found.folder, force), path, force)
    held = Artifact(path)
    if held.is_delta:
        raise RecipeError(f"{path}: is a delta of {held.pin_name}; apply it first")
    verify(path)
    walk = Walk(held.config, held, held.dtype, torch.device("cpu"))
    places = {place.site: module for module, place in placed(found, walk.anatomy).items()}
    replaced = {entry.name: entry for entry in whole(found, walk.anatomy, held)}
    rows = dict(held.provenance["sites"])
    with writing(target, SHARD_SIZE) as writer:
        for sites, plain in parts(held, found, places, walk.anatomy.places, replaced):
            packed = writer.pack(sites, plain)
            for site in sites.keys() & places.keys():
                old = rows.get(site, {})
                rows[site] = {**row(sites[site], packed.nbytes(site, sites[site].weight)), **changed(old)}
            writer.write(packed)
        said = told(held, found, walk, rows, places, writer.size)
        drawn = picture(said)
        text = card(said, PICTURE if drawn else "", carried(path))
        config = {key: value for key, value in held.config.items() if key != "quantization_config"}
        kv = held.config.get("quantization_config", {}).get("kv")
        if kv == "latent":
            check_latent(walk, writer.specs)
        writer.describe(path, config, said, text, kv, picture=drawn)
        check_runtime(Artifact(writer.partial), walk)
        verify(writer.partial)
        writer.commit()
    return Written(
        out=target, bytes=writer.size, matrices=len(places), parameters=found.parameters, whole=len(replaced)
    )


def check_latent(walk: Walk, specs: Mapping[str, Any]) -> None:
    """Raise RecipeError if no attention is left whose keys and values can be kept as latents."""
    factored = {walk.anatomy.places[site].module for site, spec in specs.items() if is_factored(spec)}
    try:
        check_cache(walk.model, "latent", factored)
    except RecipeError as error:
        raise RecipeError(f"{error}; keys and values are kept as latents: train an adapter of other modules") from error


def parts(
    held: Artifact,
    adapter: Adapter,
    adapted: Mapping[str, str],
    places: Mapping[str, Place],
    replaced: Mapping[str, Entry],
) -> Iterator[tuple[dict[str, Stored], list[Entry]]]:
    """Yields the content of each of the artifact's files: its sites with their new weights, and its plain tensors.

    `adapted` maps sites to the modules that have factors; `replaced` holds the tensors that the adapter stores whole.
    """
    files: dict[str, list[str]] = {}
    for name in held.names():
        files.setdefault(held.shard_of(name), []).append(name)
    for _, names in sorted(files.items()):
        sites: dict[str, Stored] = {}
        plain: list[Entry] = []
        for name in names:
            own = held.holders.get(name) or [s for s in adapted if places[s].tensor == name]
            sites |= {site: stored(held, adapter, site, places[site], adapted.get(site)) for site in own}
            if not own:
                plain.append(replaced.get(name) or held.entry(name))
        yield sites, plain


def stored(held: Artifact, adapter: Adapter, site: str, place: Place, module: str | None) -> Stored:
    """A site to be written: its weight, plus the product of the factors if `module` names any."""
    spec = held.specs.get(site)
    turned = place.transposed != place.turned if spec is None else spec["transposed"]
    if spec is None:
        matrix = held.tensor(place.tensor)
        weight: Weight = Dense(matrix.T.contiguous() if turned else matrix)
    else:
        weight = held.expression(site)
    if module is not None:
        if spec is not None and spec.get("inputs"):
            raise UnsupportedWeight(f"{site}: its input is quantized to {spec['inputs']}; no adapter can be added")
        left_OR, right_RI = adapter.factors(module)
        terms = weight.terms if isinstance(weight, Sum) else (weight,)
        weight = Sum((*terms, Product(Dense(left_OR), Dense(right_RI))))
    return Stored(
        weight=weight,
        tensor=place.tensor if spec is None else tensor_of(site, spec),
        transposed=turned,
        inputs="" if spec is None else spec.get("inputs", ""),
        expert=None if spec is None else spec.get("expert"),
        part=place.expert is not None,
    )


def changed(old: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a site's record that stay; its errors were measured without the adapter, which is noted."""
    kept = {key: value for key, value in old.items() if key not in ("weight", "bytes")}
    return {**kept, "adapter": True}


def told(
    held: Artifact, adapter: Adapter, walk: Walk, rows: dict[str, Any], places: Mapping[str, str], size: int
) -> dict[str, Any]:
    """compress.json without the hashes of what was written."""
    before = held.provenance
    anatomy = walk.anatomy.places
    weights = sum(place.shape[0] * place.shape[1] for place in anatomy.values())
    was = {
        site: before["sites"][site]["bytes"] if site in before["sites"] else plain(held, anatomy[site])
        for site in places
    }
    more = sum(rows[site]["bytes"] - was[site] for site in places)
    ranks = sorted({pair.rank for pair in adapter.pairs.values()})
    note = NOTE.format(
        name=display_name(adapter.folder), rank=", ".join(f"r{rank}" for rank in ranks) or "whole tensors"
    )
    tensors = {anatomy[site].tensor for site in places}
    return {
        **{key: value for key, value in before.items() if key not in FORGOTTEN},
        "versions": versions(),
        "recipe": before["recipe"] + note,
        "sizes": {
            **before["sizes"], "bytes": size,
            "bits_per_weight": before["sizes"]["bits_per_weight"] + 8 * more / weights,
        },
        "probe": {"tokens": 0, "kl": 0.0},
        "adapter": {"name": display_name(adapter.folder), "sha256": digest(adapter.folder / WEIGHTS)},
        "sites": rows,
        "untouched": {name: why for name, why in before["untouched"].items() if name not in tensors},
    }  # fmt: skip


def plain(held: Artifact, place: Place) -> int:
    """Bytes of a site that was stored as a plain matrix."""
    return place.shape[0] * place.shape[1] * held.dtype.itemsize


__all__ = ["attach"]
