"""Writing an artifact in other people's formats: one file a format, one table.

What a format cannot say is refused with the site, the reason and the nearest format that can; nothing is requantized.
Not here: optimum. Of what it still has (2.3), its GPTQ loader is what transformers needs to read our `gptq` folders,
and is used there by its users; its exporters to ONNX and others have moved to packages of their own, its graph passes
no longer run, and its calibration sets and model tables are no better than what this package has.
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
    """Write the artifact at `path` to the folder `out` in the format named `to`, read back before it is put in place.

    Raises RecipeError for an unknown format, otherwise what the format's own function raises.
    """
    if to not in FORMATS:
        raise RecipeError(f"--to: {to!r} is not a format this version writes{nearest(to, FORMATS)}")
    return FORMATS[to](locate(path), Path(out))


__all__ = ["FORMATS", "Exported", "export"]
