"""Export to a dense model folder that stock transformers loads without this package.

Pruned weights are zeros and quantized weights the values they decode to. The result is neither smaller nor faster than
the original, and the command says so.
"""

from __future__ import annotations

from pathlib import Path

from compress.export.folder import Exported, put_in_place, write_card, write_shards
from compress.writer import copy_companions, copy_shared, write_json


def export_dense(path: Path, out: Path, base: Path | None = None) -> Exported:
    """Write the dense model that the artifact at `path` decodes to into `out`, with one tensor in memory at a time.

    A delta is added to its `base`. The artifact is verified first. Raises RecipeError if `out` exists or lies inside
    the artifact, ArtifactError if `path` is not an artifact or `base` is not its base, VerificationError if the
    artifact has been changed.
    """
    with put_in_place(path, out, base) as (artifact, partial):
        size = write_shards(artifact, partial, lambda name: [artifact.entry(name)])
        copy_shared(artifact, partial)
        copy_companions(path, partial)
        config = {key: value for key, value in artifact.config.items() if key != "quantization_config"}
        write_json(partial / "config.json", config)
        note = "loads without Compress, and is as large as a dense model of its shape"
        write_card(artifact, partial, "dense", note)
    return Exported(out=out, format="dense", bytes=size, rounding=0.0, note=note)
