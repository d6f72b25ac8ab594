"""Export to a plain dense folder that stock transformers loads without us: zeros and grid values included.

Nothing is smaller or faster afterwards, and the command says so.
"""

from __future__ import annotations

from pathlib import Path

from compress.export.folder import Exported, put_in_place, write_card, write_shards
from compress.writer import copy_companions, copy_shared, write_json


def export_dense(path: Path, out: Path, base: Path | None = None) -> Exported:
    """Write the plain model that the artifact at `path` denotes to `out`, one tensor in memory at a time.

    A delta is added to its `base`. The artifact is verified first. Raises RecipeError if `out` exists or lies in the
    artifact, ArtifactError if `path` is not an artifact or `base` not its base, VerificationError if it was changed.
    """
    with put_in_place(path, out, base) as (artifact, partial):
        size = write_shards(artifact, partial, lambda name: [artifact.entry(name)])
        copy_shared(artifact, partial)
        copy_companions(path, partial)
        config = {key: value for key, value in artifact.config.items() if key != "quantization_config"}
        write_json(partial / "config.json", config)
        note = "loads without Compress, and is as large as any dense one"
        write_card(artifact, partial, "dense", note)
    return Exported(out=out, format="dense", bytes=size, rounding=0.0, note=note)
