"""The passes: an explicit list here, other people's through the entry points `compress.passes`."""

from __future__ import annotations

from importlib.metadata import entry_points

from compress.passes.base import PASSES, Pruner, Quantizer, WeightPass
from compress.passes.manager import PassManager
from compress.passes.pruning.magnitude import Magnitude
from compress.passes.pruning.wanda import Wanda
from compress.passes.quantization.gptq import GPTQ
from compress.passes.quantization.rtn import RTN

__all__ = [
    "GPTQ", "PASSES", "RTN", "Magnitude", "PassManager", "Pruner", "Quantizer", "Wanda", "WeightPass", "load_plugins",
]  # fmt: skip


def load_plugins() -> None:
    """Import the passes that other installed packages declare under `compress.passes`."""
    for entry in entry_points(group="compress.passes"):
        entry.load()
