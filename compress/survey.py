"""A survey of a model folder that is not an artifact: its sites by kind, and what no pass would touch. Headers only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.model.anatomy import Place, coverage
from compress.model.family import TESTED
from compress.model.source import display_name, dtype_of
from compress.model.walk import Walk
from compress.plan import check_tensors
from compress.sources import open_source

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def survey(folder: Path) -> dict[str, Any]:
    """The architecture, sizes and sites of a model folder, as plain data.

    Raises ArtifactError for a folder that `compress run` would refuse too.
    """
    source = open_source(folder, dequantize=True)
    walk = Walk(source.config, source, dtype_of(source.config), torch.device("cpu"))
    check_tensors(walk, source)
    covered = coverage(walk.anatomy, ["*"])
    return {
        "path": str(folder),
        "name": display_name(folder),
        "family": str(source.config.get("model_type")),
        "tested_family": str(source.config.get("model_type")) in TESTED,
        "architecture": type(walk.model).__name__,
        "dtype": str(dtype_of(source.config)).removeprefix("torch."),
        "decoded_from": source.decoded_from,
        "bytes": source.nbytes(),
        "files": len(set(source.files.values())),
        "blocks": len(walk.blocks),
        "sites": kinds(list(walk.anatomy.places.values())),
        "untouched": covered.reasons(),
        "missed_share": covered.missed_share,
        "non_embedding": non_embedding(walk),
        "vocabulary": int(walk.model.get_input_embeddings().num_embeddings),
    }


def non_embedding(walk: Walk) -> int:
    """The number of parameters of the language part, without embeddings and output head; all experts count."""
    anatomy = walk.anatomy
    tables = {name for name, module in anatomy.modules.items() if isinstance(module, nn.Embedding)}
    return sum(
        parameter.numel()
        for name, parameter in walk.model.named_parameters()
        if anatomy.in_language(name) and name not in anatomy.heads and name.rpartition(".")[0] not in tables
    )


def kinds(places: list[Place]) -> list[dict[str, Any]]:
    """The sites grouped by name, with every number replaced by `*`, and shape [out, in]: count and parameters."""
    found: dict[tuple[str, tuple[int, int]], dict[str, Any]] = {}
    for place in places:
        name = NUMBER.sub("*", place.site)
        row = found.setdefault(
            (name, place.shape),
            {"sites": name, "shape": list(place.shape), "count": 0, "parameters": 0, "expert": place.routed},
        )
        row["count"] += 1
        row["parameters"] += place.shape[0] * place.shape[1]
    return list(found.values())
