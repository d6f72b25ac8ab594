"""Export to the layout of GPTQ checkpoints, which transformers (with optimum and gptqmodel), vLLM and others load.

The layout has one bit width and one group size for all layers, float16 scales and integer zero points. Version 1 stores
each zero point minus one, so a zero point of 0 would borrow from its neighbour in the packed word. If there is one, the
folder is written as `gptq_v2`, which stores zero points unchanged. Columns keep their order, so `g_idx` contains no
more than the group size does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.artifact import Artifact
from compress.errors import UnsupportedWeight
from compress.export.folder import Exported, Form, write_folder
from compress.export.leaf import Leaf
from compress.export.words import from_words, to_words
from compress.weights import Dense, Quantized

NAME = "gptq"
WIDTHS = (2, 4, 8)
GROUPS = (0, 16, 32, 64, 128, 256, 512, 1024)  # group sizes that the loaders' kernels support; 0 is a whole row
MULTIPLE = 32  # must divide both sides of a matrix, so that every width fills whole words


class Layout(NamedTuple):
    """The settings that hold for all layers: bits, and the number of inputs that share a scale (0: a whole row)."""

    bits: int
    group: int


def export_gptq(path: Path, out: Path) -> Exported:
    """Write the artifact at `path` as a GPTQ checkpoint; raises the errors of `write_folder`.

    Source: Frantar et al., GPTQ, ICLR 2023, released code, as packed by AutoGPTQ and GPT-QModel (`pack`).
    """
    return write_folder(path, out, GPTQLayout)


class GPTQLayout(Form):
    """The GPTQ format: integers of one width and group size, symmetric or with integer zero points."""

    name = NAME

    def __init__(self, artifact: Artifact) -> None:
        self.symmetric, self.lowest = True, 255
        super().__init__(artifact)
        self.version = "gptq" if self.lowest else "gptq_v2"
        self.only = self.modules()

    def scheme(self, site: Leaf) -> Layout | None:
        """The width and group size of a site, None if dense; raises UnsupportedWeight if the layout cannot hold it."""
        weight = site.weight
        if isinstance(weight, Dense):
            return None
        if not isinstance(weight, Quantized):
            raise site.refused(NAME, "it stores only integers on a grid", "use --to compressed-tensors or dense")
        self.check(site, weight)
        found = Layout(weight.bits, weight.group if weight.scale.shape[1] > 1 else 0)
        first = next(iter(self.schemes.values()), found)
        if found != first:
            reason = f"all layers must have one width and group size; the first site has {described(first)}"
            raise site.refused(NAME, reason, "use --to compressed-tensors or dense")
        if weight.zero is not None:
            self.symmetric = False
            self.lowest = min(self.lowest, int(weight.zero.min()))
        return found

    def check(self, site: Leaf, weight: Quantized) -> None:
        """Raise UnsupportedWeight for quantized values that the layout cannot hold."""
        if site.inputs:
            raise site.refused(NAME, "its layers do not round inputs", "use --to compressed-tensors or dense")
        if weight.bits not in WIDTHS:
            raise site.refused(
                NAME,
                f"codes of {weight.bits} bits do not fill its 32-bit words evenly",
                "use bits: 2, 4 or 8, or --to dense",
            )
        if weight.scale.shape[1] > 1 and weight.group not in GROUPS:
            allowed = ", ".join(map(str, GROUPS))
            raise site.refused(
                NAME, f"its loaders do not support groups of {weight.group}", f"use group: {allowed}, or --to dense"
            )
        if any(side % MULTIPLE for side in weight.shape):
            raise site.refused(NAME, f"both sides of a matrix must be multiples of {MULTIPLE}", "use --to dense")
        if weight.zero is not None and weight.zero.is_floating_point():
            raise site.refused(
                NAME, "its zero points are integers", "use a pass with integer zero points, or --to dense"
            )
        if not torch.equal(weight.scale.to(torch.float16).float(), weight.scale.float()):
            raise site.refused(
                NAME, "its scales are float16, and one of these is not exactly representable", "use --to dense"
            )

    def modules(self) -> list[str] | None:
        """The names, within a block, of the quantized modules; None if all matrices of the blocks are quantized.

        Only the blocks of the language model count. Raises UnsupportedWeight if a module is quantized in some blocks
        only, because the layout names modules for every block alike.
        """
        ends = Counter(self.end_of(self.module_of(self.key_of(site))) for site in self.schemes)
        sources, headers = self.anatomy.layout.sources, self.artifact.headers
        matrices = [
            parameter.removesuffix(".weight")
            for parameter, names in sources.items()
            if self.anatomy.in_block(parameter) and any(len(headers[name].shape) > 1 for name in names)
        ]
        held = Counter(self.end_of(module) for module in matrices)
        some = [end for end, found in sorted(ends.items()) if found != held[end]]
        if some:
            raise UnsupportedWeight(
                f"{NAME} cannot represent that {some[0]} is quantized in some blocks only; "
                "use --to compressed-tensors or dense"
            )
        return sorted(ends) if held.keys() - ends.keys() else None

    def end_of(self, module: str) -> str:
        """The name of a module within its block, such as `mlp.up_proj`."""
        return module.removeprefix(f"{self.anatomy.path}.").partition(".")[2]

    def pack(self, site: Leaf, scheme: Layout) -> dict[str, Tensor]:
        """The tensors of a site, stored as [in, out]: `qweight` is packed along inputs, `qzeros` along outputs."""
        weight = site.weight
        if not isinstance(weight, Quantized):
            raise site.refused(NAME, "it has no layout for it", "use --to dense")
        rows, columns = weight.shape
        scale_OG = weight.scale.expand(rows, -1).to(torch.float16)
        middle = torch.tensor(2 ** (weight.bits - 1)) if weight.zero is None else weight.zero
        zero_OG = middle.expand(scale_OG.shape) - (1 if self.version == "gptq" else 0)
        return {
            "qweight": to_words(weight.codes, weight.bits).T,
            "qzeros": to_words(zero_OG.T.to(torch.uint8), weight.bits),
            "scales": scale_OG.T,
            "g_idx": (torch.arange(columns) // (scheme.group or columns)).to(torch.int32),
        }

    def unpack(self, stored: Mapping[str, Tensor], scheme: Layout, dtype: torch.dtype) -> Tensor:
        """The matrix, scale * (code - zero), decoded by the definition of the layout."""
        codes_OI = from_words(stored["qweight"].T.contiguous(), scheme.bits)
        zeros_GO = from_words(stored["qzeros"], scheme.bits) + (1 if self.version == "gptq" else 0)
        groups = stored["g_idx"].long()
        zero_OI, scale_OI = zeros_GO.T[:, groups], stored["scales"].T[:, groups]
        return ((codes_OI - zero_OI).float() * scale_OI.float()).to(dtype)

    def config(self) -> dict[str, Any]:
        """The config, which describes all layers of the language model's blocks at once."""
        layout: Layout = next(iter(self.schemes.values()))
        only = {} if self.only is None else {"modules_in_block_to_quantize": [self.only]}
        return {
            "quant_method": "gptq", "bits": layout.bits, "group_size": layout.group or -1, "sym": self.symmetric,
            "desc_act": False, "checkpoint_format": self.version, "lm_head": False,
            "block_name_to_quantize": self.anatomy.path, **only,
        }  # fmt: skip

    def note(self, rounding: float) -> str:
        """One line on what loads the folder."""
        del rounding
        return f"exact ({self.version}); transformers loads it with optimum and gptqmodel, in float16 or bfloat16"


def described(layout: Layout) -> str:
    """A layout as text, such as `4 bits by 64`."""
    return f"{layout.bits} bits by {layout.group or 'row'}"
