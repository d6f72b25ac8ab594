"""All passes: those of this package in an explicit list, others through the entry points `compress.passes`."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from compress.errors import RecipeError, first_line
from compress.passes.base import (
    PASSES,
    BlockPass,
    BlockQuantizer,
    Budget,
    GridQuantizer,
    Pass,
    Pruner,
    Quantizer,
    Refiner,
    Reshape,
    SitePass,
    WeightPass,
    windows_at_once,
)
from compress.passes.budget import governed
from compress.passes.codec import Codec
from compress.passes.corrector import Corrector
from compress.passes.delta.auto import Auto
from compress.passes.delta.bitdelta import BitDelta
from compress.passes.delta.dare import DARE
from compress.passes.delta.delta_come import DeltaCoMe
from compress.passes.delta.lora import LoRA
from compress.passes.equalizer import Equalizer
from compress.passes.factorizer import Factorizer
from compress.passes.hybrid.finetune import FineTune
from compress.passes.hybrid.oats import OATS
from compress.passes.hybrid.realign import Realign
from compress.passes.hybrid.reallm import ReALLM
from compress.passes.hybrid.repair import Repair
from compress.passes.hybrid.rpca import RPCA
from compress.passes.hybrid.slim import SLiM
from compress.passes.lowrank.asvd import ASVD
from compress.passes.lowrank.greedy_ranks import Ranks
from compress.passes.lowrank.svd import SVD
from compress.passes.lowrank.svd_llm import SVDLLM
from compress.passes.lowrank.transmla import TransMLA
from compress.passes.lowrank.welore import WeLore
from compress.passes.manager import PassManager
from compress.passes.pruning.alps import ALPS
from compress.passes.pruning.dsnot import DSnoT
from compress.passes.pruning.flap import FLAP
from compress.passes.pruning.global_budget import Global
from compress.passes.pruning.magnitude import Magnitude
from compress.passes.pruning.owl import OWL
from compress.passes.pruning.reconstruct import Reconstruct
from compress.passes.pruning.ria import RIA
from compress.passes.pruning.sensitivity import Sensitivity
from compress.passes.pruning.shortgpt import ShortGPT
from compress.passes.pruning.slicegpt import SliceGPT
from compress.passes.pruning.sparsegpt import SparseGPT
from compress.passes.pruning.swaps import Swaps
from compress.passes.pruning.wanda import Wanda
from compress.passes.pruning.wanda_sp import WandaSP
from compress.passes.quantization.awq import AWQ
from compress.passes.quantization.bnb import NF4, Int8
from compress.passes.quantization.flexround import FlexRound
from compress.passes.quantization.fp4 import MXFP4, NVFP4
from compress.passes.quantization.fp8 import FP8
from compress.passes.quantization.gptq import GPTQ
from compress.passes.quantization.hqq import HQQ
from compress.passes.quantization.lrq import LRQ
from compress.passes.quantization.rotate import QuaRot, Rotate
from compress.passes.quantization.rtn import RTN
from compress.passes.quantization.smoothquant import SmoothQuant
from compress.passes.quantization.vq import VQ
from compress.passes.structured import StructuredPruner

__all__ = [
    "ALPS",
    "ASVD",
    "AWQ",
    "DARE",
    "FLAP",
    "FP8",
    "GPTQ",
    "HQQ",
    "LRQ",
    "MXFP4",
    "NF4",
    "NVFP4",
    "OATS",
    "OWL",
    "PASSES",
    "RIA",
    "RPCA",
    "RTN",
    "SVD",
    "SVDLLM",
    "VQ",
    "Auto",
    "BitDelta",
    "BlockPass",
    "BlockQuantizer",
    "Budget",
    "Codec",
    "Corrector",
    "DSnoT",
    "DeltaCoMe",
    "Equalizer",
    "Factorizer",
    "FineTune",
    "FlexRound",
    "Global",
    "GridQuantizer",
    "Int8",
    "LoRA",
    "Magnitude",
    "Pass",
    "PassManager",
    "Pruner",
    "QuaRot",
    "Quantizer",
    "Ranks",
    "ReALLM",
    "Realign",
    "Reconstruct",
    "Refiner",
    "Repair",
    "Reshape",
    "Rotate",
    "SLiM",
    "Sensitivity",
    "ShortGPT",
    "SitePass",
    "SliceGPT",
    "SmoothQuant",
    "SparseGPT",
    "StructuredPruner",
    "Swaps",
    "TransMLA",
    "Wanda",
    "WandaSP",
    "WeLore",
    "WeightPass",
    "governed",
    "load_plugins",
    "windows_at_once",
]  # fmt: skip


@cache
def declared(_path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The passes that the packages on this path declare; finding them takes longer than reading a recipe."""
    return tuple(entry_points(group="compress.passes"))


def load_plugins() -> None:
    """Import the passes that other installed packages declare under `compress.passes`.

    Raises RecipeError for one that cannot be imported.
    """
    for entry in declared(tuple(sys.path)):
        try:
            entry.load()
        except Exception as error:  # third-party code may raise anything
            raise RecipeError(
                f"the pass {entry.name!r} cannot be imported from {entry.value}: {first_line(error)}; "
                "fix or remove its package"
            ) from error
