"""The subjects of the benchmarks: every packed format of this package and its peers, each made from a random matrix.

A subject is made many times, so that weights can rotate to exceed the last-level cache. A peer that is not installed,
or does not support the device, is left out with the reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress_kernels import bitmap, dispatch, nm, w8a8, wq

Product = Callable[[Tensor], Tensor]
GROUP = 128


@dataclass(frozen=True, kw_only=True)
class Made:
    """One weight: its product, the bytes that a product reads, and the matrix [out, in] that it decodes to.

    `way` says, for a number of rows, whether this package's kernel computes the product or the weight is decoded and
    multiplied as dense; it is `library` for peers.
    """

    product: Product
    nbytes: int
    matrix: Tensor
    way: Callable[[int], str] = lambda rows: "library"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A format of this package or of a peer; `missing` says why it cannot be timed here."""

    name: str
    make: Callable[[Tensor], Made]
    missing: str = ""


Form = wq.Packed | nm.Packed | bitmap.Packed | w8a8.Packed


@dataclass(frozen=True, kw_only=True)
class Ours:
    """A packed form of this package: how it is made from a matrix, multiplied and decoded.

    With `kernel`, `linear` is always the kernel, whichever path the op would choose.
    """

    name: str
    pack: Callable[[Tensor], Form]
    linear: Callable[[Any, Tensor], Tensor]
    reference: Callable[[Any], Tensor]
    missing: str = ""
    kernel: bool = False

    def make(self, w_OI: Tensor) -> Made:
        """A weight of this form that approximates a matrix."""
        form = self.pack(w_OI)

        def way(rows: int) -> str:
            return dispatch.KERNEL if self.kernel else dispatch.way(form, rows, w_OI.device)

        matrix = self.reference(form).to(w_OI.dtype)
        return Made(product=partial(self.linear, form), nbytes=form.nbytes, matrix=matrix, way=way)


def integers(w_OI: Tensor, bits: int, group: int) -> wq.Packed:
    """The matrix as integer codes."""
    return wq.pack(*grid(w_OI, bits, group), bits)


def floats(w_OI: Tensor) -> wq.Packed:
    """The matrix in e4m3 with one scale per row."""
    return wq.pack_floats(*small(w_OI), (1, w_OI.shape[1]))


def small(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The e4m3 values of a matrix and the scale of each row."""
    scale = w_OI.float().abs().amax(1, keepdim=True).clamp(min=1e-6) / 448
    return (w_OI.float() / scale).to(torch.float8_e4m3fn), scale.half()


def book(w_OI: Tensor) -> wq.Packed:
    """The matrix rounded to the nearest of sixteen quantiles of a normal distribution, in groups of 64."""
    entries = torch.erfinv(torch.linspace(-0.93, 0.93, 16, device=w_OI.device))
    groups = w_OI.float().unflatten(1, (-1, 64))
    scale = (groups.abs().amax(-1) / entries.max()).clamp(min=1e-6).half()
    codes = (groups / scale.float()[..., None])[..., None].sub(entries).abs().argmin(-1)
    return wq.pack_book(codes.flatten(1).to(torch.uint8), entries, scale)


def kept(w_OI: Tensor, keep: int, of: int) -> Tensor:
    """The mask that keeps the `keep` largest of every `of` entries of a row."""
    groups = w_OI.abs().unflatten(1, (-1, of))
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(keep, -1).indices, True)
    return mask.flatten(1)


def sparse(w_OI: Tensor, keep: int, of: int, bits: int = 16) -> nm.Packed:
    """The matrix pruned n:m by magnitude, with kept values in 16 bits or as codes of `bits` bits."""
    mask = kept(w_OI, keep, of)
    if bits == 16:
        return nm.pack(w_OI, mask, keep, of)
    return nm.pack_codes(*grid(w_OI, bits, GROUP), None, bits, mask, keep, of)


def anywhere(w_OI: Tensor) -> bitmap.Packed:
    """The matrix with the larger half of its entries kept."""
    return bitmap.pack(w_OI, w_OI.abs() > w_OI.abs().float().median())


def by_kernel(form: bitmap.Packed, x: Tensor) -> Tensor:
    """The product by the kernel itself, which the op never uses unless it was tuned."""
    if not x.is_cuda:
        return bitmap.linear(form, x)
    from compress_kernels.gpu import bitmap as gpu

    return gpu.linear(x, form, None)


def eight(w_OI: Tensor) -> w8a8.Packed:
    """The matrix as int8 codes for int8 inputs, with one scale per row."""
    codes, scale = grid(w_OI, 8, 0)
    return w8a8.pack((codes.short() - 128).to(torch.int8), scale)


def decoded(form: w8a8.Packed) -> Tensor:
    """The matrix that int8 codes and their scales stand for."""
    return form.codes.float() * form.scale.T.float()


def ours() -> Iterator[Ours]:
    """The formats of this package."""
    for bits, group in ((8, 0), (4, GROUP), (4, 32), (3, GROUP), (2, GROUP)):
        name = f"int{bits} g{group}" if group else f"int{bits} row"
        yield of_words(name, partial(integers, bits=bits, group=group))
    yield of_words("fp8 row", floats)
    yield of_words("nf4-like g64", book)
    for keep, of in ((2, 4), (1, 4), (4, 8)):
        yield of_slots(f"{keep}:{of}", partial(sparse, keep=keep, of=of))
    yield of_slots("2:4 int4 g128", partial(sparse, keep=2, of=4, bits=4))
    yield Ours(name="50% anywhere", pack=anywhere, linear=by_kernel, reference=bitmap.reference, kernel=True)
    yield Ours(name="int8 x int8", pack=eight, linear=w8a8.linear, reference=decoded)


def of_words(name: str, pack: Callable[[Tensor], wq.Packed]) -> Ours:
    """A weight-only form."""
    return Ours(name=name, pack=pack, linear=wq.linear, reference=wq.reference)


def of_slots(name: str, pack: Callable[[Tensor], nm.Packed]) -> Ours:
    """An n:m form."""
    return Ours(name=name, pack=pack, linear=nm.linear, reference=nm.reference)


def grid(w_OI: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes and float16 scales of a matrix, quantized symmetrically by rounding to nearest."""
    groups = w_OI.float().unflatten(1, (-1, group or w_OI.shape[1]))
    half = 2 ** (bits - 1)
    scale = (groups.abs().amax(-1) / max(half - 1, 1)).clamp(min=1e-6).half()
    codes = (groups / scale.float()[..., None]).round().add_(half).clamp_(0, 2 * half - 1)
    return codes.flatten(1).to(torch.uint8), scale


def dense(w_OI: Tensor) -> Made:
    """torch's dense product, which is cuBLAS on a GPU."""
    w_OI = w_OI.clone()
    return Made(product=lambda x: F.linear(x, w_OI), nbytes=w_OI.nbytes, matrix=w_OI)


def tinygemm(w_OI: Tensor) -> Made:
    """torch's int4 product for bf16 inputs (tinygemm)."""
    codes, scale = grid(w_OI, 4, GROUP)
    matrix = wq.reference(wq.pack(codes, scale, 4)).to(w_OI.dtype)
    pairs = torch.stack((scale.T, torch.zeros_like(scale.T)), -1).contiguous().bfloat16()
    nibbles = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    words = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
    nbytes = words.nbytes + pairs.nbytes
    product = lambda x: torch.ops.aten._weight_int4pack_mm(x, words, GROUP, pairs)  # noqa: E731
    return Made(product=product, nbytes=nbytes, matrix=matrix)


def semi_structured(w_OI: Tensor) -> Made:
    """torch's 2:4 product on sparse tensor cores, which is cuSPARSELt."""
    keep = torch.zeros_like(w_OI.view(-1, 4), dtype=torch.bool)
    keep.scatter_(1, w_OI.view(-1, 4).abs().topk(2, 1).indices, True)
    matrix = w_OI * keep.view_as(w_OI)
    sparse = torch.sparse.to_sparse_semi_structured(matrix)
    return Made(product=lambda x: F.linear(x, sparse), nbytes=matrix.nbytes * 9 // 16, matrix=matrix)


def bitsandbytes_nf4(w_OI: Tensor) -> Made:
    """bitsandbytes' NF4 product, in blocks of 64."""
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


def peers(device: torch.device) -> Iterator[Subject]:
    """The formats of other libraries for the same product."""
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
