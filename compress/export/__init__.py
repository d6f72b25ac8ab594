"""Writes an artifact in formats of other libraries: one module per format, and one table of them.

A site that a format cannot represent is refused with the site's name, the reason and the closest format that can;
nothing is requantized. This package does not use optimum. Of what optimum 2.3 still contains, transformers needs its
GPTQ loader to read `gptq` folders, so users of such folders install it themselves; its exporters to ONNX and other
formats have moved to packages of their own, its graph passes no longer run, and its calibration sets and model tables
are no better than those of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compress.errors import RecipeError, nearest
from compress.export.bitsandbytes import export_bitsandbytes
from compress.export.compressed_tensors import export_compressed_tensors
from compress.export.dense import export_dense
from compress.export.folder import Exported
from compress.export.gguf import export_gguf
from compress.export.gptq import export_gptq
from compress.export.peft import export_peft
from compress.model.source import locate

FORMATS: dict[str, Callable[[Path, Path], Exported]] = {
    "bitsandbytes": export_bitsandbytes,
    "compressed-tensors": export_compressed_tensors,
    "dense": export_dense,
    "gguf": export_gguf,
    "gptq": export_gptq,
    "peft": export_peft,
}


def export(path: str | Path, to: str, out: str | Path) -> Exported:
    """Write the artifact at `path` to the folder `out` in the format `to`; it is read back before it is put in place.

    Raises RecipeError for an unknown format, and whatever the format's own function raises.
    """
    if to not in FORMATS:
        raise RecipeError(f"--to: {to!r} is not a format this version writes{nearest(to, FORMATS)}")
    return FORMATS[to](locate(path), Path(out))


__all__ = ["FORMATS", "Exported", "export"]
