"""Export to a plain dense folder that stock transformers loads without us: zeros and grid values included.

Streams one source shard at a time; nothing is smaller or faster afterwards, and the command says so.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from uuid import uuid4

from compress.artifact import Artifact, verify
from compress.errors import ArtifactError
from compress.model.source import INDEX
from compress.plan import free_place
from compress.shards import WriteError, write_shard
from compress.writer import copy_companions, write_json


def export_dense(path: Path, out: Path) -> int:
    """Write the plain model that the artifact at `path` denotes to `out`; its tensor bytes.

    The artifact is verified first. Raises RecipeError if `out` exists or lies in the artifact, ArtifactError if `path`
    is not an artifact, VerificationError if it was changed.
    """
    out = free_place(out, path, force=False)
    verify(path)
    artifact = Artifact(path)
    partial = out.parent / f"{out.name}.partial-{uuid4().hex[:8]}"
    try:
        partial.mkdir(parents=True)
        size = write_shards(artifact, partial)
        copy_companions(path, partial)
        config = {key: value for key, value in artifact.config.items() if key != "quantization_config"}
        write_json(partial / "config.json", config)
        partial.rename(out)
    except (OSError, WriteError) as error:
        raise ArtifactError(f"{out}: cannot be written: {error.__cause__ or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return size


def write_shards(artifact: Artifact, folder: Path) -> int:
    """One output shard for each of the artifact's, one tensor in memory at a time; returns tensor bytes."""
    held: dict[str, list[str]] = {}
    for name in artifact.names():
        held.setdefault(artifact.shard_of(name), []).append(name)
    weight_map: dict[str, str] = {}
    size = 0
    for shard, names in sorted(held.items()):
        entries = [artifact.entry(name) for name in names]
        write_shard(folder / shard, entries)
        weight_map |= dict.fromkeys(names, shard)
        size += sum(entry.nbytes for entry in entries)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
    return size
