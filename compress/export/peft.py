"""Export of a low-rank delta as a LoRA adapter, which PEFT loads onto the base, and vLLM and others serve.

Every site must be a product of low rank, or a sum of such products (`delta-come`), whose factors are concatenated. The
scale is 1. Not here: reading an adapter (`compress/adapters`). Shape suffixes: O out, I in, R rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.adapters.lora import PREFIX, WEIGHTS, Adapter
from compress.artifact import Artifact, tensor_of
from compress.errors import RecipeError, UnsupportedWeight, VerificationError
from compress.export.folder import Exported, difference, put_in_place, write_card
from compress.model.anatomy import Anatomy, Place
from compress.model.architecture import skeleton
from compress.model.source import ADAPTER
from compress.shards import Entry, write_shard
from compress.weights import Product, Sum, Weight
from compress.writer import copy_companions, write_json

OWN = "compress delta extract with --embeddings base --head base --others base leaves such tensors as in the base"
INSTEAD = "use `compress serve`, or `compress delta apply` for a whole model"
SAME = 1e-6  # relative RMS error between the float32 products of written and original factors


def export_peft(path: Path, out: Path) -> Exported:
    """Write the delta at `path` to the folder `out` as a LoRA adapter; its base is not needed.

    Factors are stored in the model's dtype if that is exact, else in float32. Raises RecipeError if the artifact is not
    a delta or stores tensors besides its sites, or if `out` exists; UnsupportedWeight for a site that is not of low
    rank or is part of a larger parameter; VerificationError if the adapter reads back as something else.
    """
    with put_in_place(path, out, alone=True) as (artifact, partial):
        check_delta(artifact)
        places = Anatomy(skeleton(artifact.config, artifact.dtype), shapes_of(artifact)).places
        if tables := [name for name in artifact.specs if name not in places]:
            raise RecipeError(f"{artifact.path}: stores {tables[0]} in 8 bits, which an adapter cannot hold; {OWN}")
        named = {site: adapted(artifact, site, places[site]) for site in artifact.specs}
        factors = {site: low_rank(site, artifact.difference(site), artifact.dtype) for site in named}
        entries = [
            Entry.of(f"{PREFIX}{named[site].module}.lora_{letter}.weight", factor.contiguous())
            for site, (left_OR, right_RI) in factors.items()
            for letter, factor in (("A", right_RI), ("B", left_OR))
        ]
        write_shard(partial / WEIGHTS, entries)
        ranks = {named[site].module: right_RI.shape[0] for site, (_, right_RI) in factors.items()}
        turned = any(place.transposed for place in named.values())
        write_json(partial / ADAPTER, config(artifact.pin_name, ranks, targets(ranks, places.values()), turned))
        copy_companions(path, partial)
        check(artifact, partial, named)
        note = "PEFT loads it onto the base; the sites' ranks are " + ", ".join(map(str, sorted(set(ranks.values()))))
        write_card(artifact, partial, "peft", note)
    size = sum(entry.nbytes for entry in entries)
    return Exported(out=out, format="peft", bytes=size, rounding=0.0, note=note)


def check_delta(artifact: Artifact) -> None:
    """Raise RecipeError unless the artifact is a delta that stores only sites."""
    if not artifact.is_delta:
        raise RecipeError(f"{artifact.path}: is a whole model, not a delta; only a delta can be exported as an adapter")
    if other := artifact.changed():
        raise RecipeError(f"{artifact.path}: stores {other[0]} whole, which an adapter cannot hold; {OWN}")


def shapes_of(artifact: Artifact) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of the model that a delta belongs to."""
    return {name: tuple(shape) for name, shape in artifact.provenance["tensors"].items()}


def adapted(artifact: Artifact, site: str, place: Place) -> Place:
    """The place of a site; raises UnsupportedWeight for a matrix that is part of a larger parameter."""
    if place.expert is not None or place.rows is not None or tensor_of(site, artifact.specs[site]) != place.tensor:
        raise UnsupportedWeight(f"{site}: is part of a stacked parameter, which adapters cannot address; {INSTEAD}")
    return place


def low_rank(site: str, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in] whose product is the weight; raises UnsupportedWeight if it is not of low rank."""
    terms = weight.terms if isinstance(weight, Sum) else (weight,)
    pairs = [(t.left.dense(), t.right.dense()) for t in terms if isinstance(t, Product)]
    rank = sum(left_OR.shape[1] for left_OR, _ in pairs)
    if len(pairs) < len(terms) or rank >= min(weight.shape):
        raise UnsupportedWeight(f"{site} ({weight.describe()}): is not a low-rank product; {INSTEAD}")
    left_OR = torch.cat([left_OR.float() for left_OR, _ in pairs], 1)
    right_RI = torch.cat([right_RI.float() for _, right_RI in pairs], 0)
    return narrowed(left_OR, dtype), narrowed(right_RI, dtype)


def narrowed(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 factor in `dtype` if that is exact, else unchanged."""
    narrow = factor.to(dtype)
    return narrow if bool((narrow.float() == factor).all()) else factor


def targets(ranks: dict[str, int], places: Iterable[Place]) -> list[str]:
    """`target_modules`: the last parts of the modules' names if no other module has them, else the whole paths."""
    ends = {module.rpartition(".")[2] for module in ranks}
    named = {place.module for place in places if place.module.rpartition(".")[2] in ends}
    return sorted(ends) if named == set(ranks) else sorted(ranks)


def config(base: str, ranks: dict[str, int], modules: list[str], turned: bool) -> dict[str, Any]:
    """adapter_config.json: alpha equals the rank everywhere, which makes the scale 1."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: r for module, r in sorted(ranks.items()) if r != rank}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others, "target_modules": modules,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": turned, "use_rslora": False, "use_dora": False,
        "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip


def check(artifact: Artifact, folder: Path, named: dict[str, Place]) -> None:
    """Raise VerificationError unless the adapter reads back as what the delta adds at every site."""
    adapter = Adapter(folder)
    for site, place in named.items():
        left_OR, right_RI = adapter.factors(place.module)
        error = difference(left_OR.float() @ right_RI.float(), artifact.difference(site).dense())
        if not error <= SAME:
            raise VerificationError(
                f"{site}: the matrix read back differs from the delta's by {error:.2g} (relative RMS)"
            )
