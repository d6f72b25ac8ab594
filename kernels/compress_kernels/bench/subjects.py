"""What is timed: every packed format of ours, and its peers, each made from one random matrix.

A subject is made many times, so that weights can rotate past the last cache. A peer that is not installed, or not for
this device, is left out with its reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from compress_kernels import wq

Product = Callable[[Tensor], Tensor]
GROUP = 128


@dataclass(frozen=True, kw_only=True)
class Made:
    """One weight: how it multiplies, the bytes that a product reads, and the matrix [out, in] that it denotes."""

    product: Product
    nbytes: int
    matrix: Tensor


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A format, ours or a peer's; `missing` says why it cannot be timed here."""

    name: str
    make: Callable[[Tensor], Made]
    missing: str = ""


def packed(bits: int, group: int) -> Callable[[Tensor], Made]:
    """Our integer codes."""

    def make(w_OI: Tensor) -> Made:
        codes, scale = grid(w_OI, bits, group)
        found = wq.pack(codes, scale, bits)
        matrix = wq.reference(found).to(w_OI.dtype)
        return Made(product=lambda x: wq.linear(found, x), nbytes=found.nbytes, matrix=matrix)

    return make


def grid(w_OI: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes and float16 scales, symmetric, rounded to nearest."""
    groups = w_OI.float().unflatten(1, (-1, group or w_OI.shape[1]))
    half = 2 ** (bits - 1)
    scale = (groups.abs().amax(-1) / max(half - 1, 1)).clamp(min=1e-6).half()
    codes = (groups / scale.float()[..., None]).round().add_(half).clamp_(0, 2 * half - 1)
    return codes.flatten(1).to(torch.uint8), scale


def dense(w_OI: Tensor) -> Made:
    """torch's own product: cuBLAS on a GPU."""
    w_OI = w_OI.clone()
    return Made(product=lambda x: F.linear(x, w_OI), nbytes=w_OI.nbytes, matrix=w_OI)


def tinygemm(w_OI: Tensor) -> Made:
    """torch's int4 product for bf16."""
    codes, scale = grid(w_OI, 4, GROUP)
    matrix = wq.reference(wq.pack(codes, scale, 4)).to(w_OI.dtype)
    pairs = torch.stack((scale.T, torch.zeros_like(scale.T)), -1).contiguous().bfloat16()
    nibbles = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    words = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
    nbytes = words.nbytes + pairs.nbytes
    product = lambda x: torch.ops.aten._weight_int4pack_mm(x, words, GROUP, pairs)  # noqa: E731
    return Made(product=product, nbytes=nbytes, matrix=matrix)


def semi_structured(w_OI: Tensor) -> Made:
    """torch's 2:4 product on sparse tensor cores: cuSPARSELt."""
    keep = torch.zeros_like(w_OI.view(-1, 4), dtype=torch.bool)
    keep.scatter_(1, w_OI.view(-1, 4).abs().topk(2, 1).indices, True)
    matrix = w_OI * keep.view_as(w_OI)
    sparse = torch.sparse.to_sparse_semi_structured(matrix)
    return Made(product=lambda x: F.linear(x, sparse), nbytes=matrix.nbytes * 9 // 16, matrix=matrix)


def bitsandbytes_nf4(w_OI: Tensor) -> Made:
    """bitsandbytes' four-bit product."""
    import bitsandbytes

    words, state = bitsandbytes.functional.quantize_4bit(w_OI, blocksize=64, quant_type="nf4")
    matrix = bitsandbytes.functional.dequantize_4bit(words, state)
    nbytes = words.nbytes + state.absmax.nbytes
    return Made(product=lambda x: bitsandbytes.matmul_4bit(x, words.t(), state), nbytes=nbytes, matrix=matrix)


def gemlite_int4(w_OI: Tensor) -> Made:
    """Gemlite's int4 product, from the same codes."""
    import gemlite

    codes, scale = grid(w_OI, 4, GROUP)
    layer = gemlite.GemLiteLinear(4, group_size=GROUP, in_features=w_OI.shape[1], out_features=w_OI.shape[0])
    layer.pack(codes, scale, torch.full_like(scale, 8.0), None)
    matrix = wq.reference(wq.pack(codes, scale, 4)).to(w_OI.dtype)
    return Made(product=layer, nbytes=codes.numel() // 2 + scale.nbytes, matrix=matrix)


def ours() -> Iterator[Subject]:
    """Our formats."""
    for bits, group in ((8, 0), (4, GROUP), (4, 32), (3, GROUP), (2, GROUP)):
        yield Subject(name=f"int{bits} g{group}" if group else f"int{bits} row", make=packed(bits, group))


def peers(device: torch.device) -> Iterator[Subject]:
    """What others have for the same work."""
    cuda = "" if device.type == "cuda" else "for CUDA"
    installed = {name: importlib.util.find_spec(name) is not None for name in ("bitsandbytes", "gemlite")}
    yield Subject(name="dense", make=dense)
    yield Subject(name="tinygemm int4 g128", make=tinygemm, missing=cuda)
    yield Subject(name="cusparselt 2:4", make=semi_structured, missing=cuda)
    yield Subject(
        name="bitsandbytes nf4", make=bitsandbytes_nf4, missing="" if installed["bitsandbytes"] else "not installed"
    )
    yield Subject(
        name="gemlite int4 g128", make=gemlite_int4, missing=cuda or ("" if installed["gemlite"] else "not installed")
    )
