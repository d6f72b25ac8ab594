"""The codec at the disk boundary: expression <-> named tensors plus a JSON specification.

Codes are stored as a little-endian bit stream, masks as `masks.py` says, pruned entries not at all. Payloads are flat
on purpose: a loader that does not know this format meets a shape it cannot assign and stops, instead of silently
reading codes as weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from compress.errors import ArtifactError, UnsupportedWeight, pass_on_memory
from compress.weights.bits import pack_bits, packed_size, unpack_bits
from compress.weights.chance import plausible, regenerated
from compress.weights.expr import Masked, Product, Sum, Weight
from compress.weights.kept import kept_of, put, take
from compress.weights.leaves import (
    BOOKS,
    Codebook,
    Dense,
    Diagonal,
    External,
    Hadamard,
    Nested,
    Permutation,
    Quantized,
    Scaled,
    Signs,
)
from compress.weights.masks import BY_NAME, form_of, likely_bytes, mask_bytes, pack_mask, unpack_mask

SMALLEST = 256  # bytes; smaller tensors of several sites are not worth storing once
PLAUSIBLE = 1 << 12  # entries a stored byte; if more do not fit the memory, the specification lies
Spec = dict[str, Any]
Resolve = Callable[[str, str], Tensor]  # (source, tensor name) -> the base model's tensor
FLOATS = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}


def pack(weight: Weight, at: str = "", keep_OI: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors stored for `weight`, by their path in the tree; pruned entries are dropped."""

    def kept(t: Tensor) -> Tensor:
        return t.reshape(-1) if keep_OI is None else take(t, keep_OI)

    match weight:
        case Dense(data):
            return {f"{at}data": kept(data)}
        case Quantized(codes, scale, zero, bits):
            zeros = {} if zero is None else {f"{at}zero": zero if is_real(zero) else pack_bits(zero, bits)}
            return {f"{at}codes": pack_bits(kept(codes), bits), f"{at}scale": scale, **zeros}
        case Signs(positive, scale):
            return {f"{at}signs": pack_bits(kept(positive), 1), f"{at}scale": scale}
        case Scaled(data, scale):
            return {f"{at}data": taken(data, keep_OI), f"{at}scale": scale}
        case Codebook(codes, book, scale, name):
            held = {} if name else {f"{at}book": book}
            chosen = kept(codes) if book.shape[1] == 1 else codes
            return {f"{at}codes": pack_bits(chosen, weight.bits), **held, **pack(scale, f"{at}scale.")}
        case Nested(codes, absmax, offset):
            return {f"{at}codes": kept(codes), f"{at}absmax": absmax, f"{at}offset": offset}
        case Masked(values, mask_OI, pattern):
            mask = pack_mask(mask_OI, form_of(mask_OI, pattern))
            return {**pack(values, f"{at}values.", mask_OI), **({} if mask is None else {f"{at}mask": mask})}
        case Sum(terms):
            return {k: v for i, term in enumerate(terms) for k, v in pack(term, f"{at}terms.{i}.").items()}
        case Product(left, right):
            return pack(left, f"{at}left.") | pack(right, f"{at}right.")
        case Diagonal(diagonal):
            return {f"{at}diagonal": diagonal}
        case Permutation(order):
            return {f"{at}order": order.to(torch.int32)}
        case Hadamard(positive):
            return {f"{at}signs": pack_bits(positive, 1)}
        case External():
            return {}
        case _:
            raise UnsupportedWeight(f"{weight.describe()} has no stored form")


def packed_bytes(weight: Weight, kept: int | None = None) -> int:
    """Bytes of `pack(weight)` without packing; an elementwise leaf stores `kept` entries, by default all."""
    count = weight.shape[0] * weight.shape[1] if kept is None else kept
    match weight:
        case Dense(data):
            return count * data.element_size()
        case Quantized(_, scale, zero, bits):
            zeros = 0 if zero is None else zero.nbytes if is_real(zero) else packed_size(zero.numel(), bits)
            return packed_size(count, bits) + scale.nbytes + zeros
        case Signs(_, scale):
            return packed_size(count, 1) + scale.nbytes
        case Scaled(data, scale):
            return count * data.element_size() + scale.nbytes
        case Codebook(codes, book, scale, name):
            codes_held = count if book.shape[1] == 1 else codes.numel()
            return packed_size(codes_held, weight.bits) + (0 if name else book.nbytes) + packed_bytes(scale)
        case Nested(_, absmax, offset):
            return count + absmax.nbytes + offset.nbytes
        case Masked(values, mask_OI, pattern) if mask_OI.is_meta:
            return packed_bytes(values, weight.kept) + likely_bytes(weight.kept, mask_OI.numel(), pattern)
        case Masked(values, mask_OI, pattern):
            return packed_bytes(values, weight.kept) + mask_bytes(mask_OI, form_of(mask_OI, pattern))
        case Sum(terms):
            return sum(packed_bytes(term) for term in terms)
        case Product(left, right):
            return packed_bytes(left) + packed_bytes(right)
        case Diagonal(diagonal):
            return diagonal.nbytes
        case Permutation(order):
            return 4 * order.numel()
        case Hadamard(positive):
            return packed_size(positive.numel(), 1)
        case External():
            return 0
        case _:
            raise UnsupportedWeight(f"{weight.describe()} has no stored form")


def specify(weight: Weight) -> Spec:
    """The JSON description from which `unpack` rebuilds the expression, given its tensors."""
    shape = list(weight.shape)
    match weight:
        case Dense(data):
            return {"kind": "dense", "shape": shape, "dtype": str(data.dtype).removeprefix("torch.")}
        case Quantized(_, scale, zero, bits):
            return {"kind": "quantized", "shape": shape, "bits": bits, "scales": list(scale.shape),
                    "symmetric": zero is None}  # fmt: skip
        case Signs() | Nested():
            return {"kind": type(weight).__name__.lower(), "shape": shape}
        case Scaled(data, scale, rows, columns):
            return {"kind": "scaled", "shape": shape, "scales": list(scale.shape), "tile": [rows, columns]}
        case Codebook(codes, book, scale, name):
            return {"kind": "codebook", "shape": shape, "codes": list(codes.shape), "book": name or list(book.shape),
                    "scale": specify(scale)}  # fmt: skip
        case Masked(values, mask_OI, pattern):
            form = form_of(mask_OI, pattern)
            return {"kind": "masked", "shape": shape, "pattern": pattern, "kept": kept_of(mask_OI),
                    **({} if form is None else {"mask": form}), "values": specify(values)}  # fmt: skip
        case Sum(terms):
            return {"kind": "sum", "shape": shape, "terms": [specify(term) for term in terms]}
        case Product(left, right):
            return {"kind": "product", "shape": shape, "left": specify(left), "right": specify(right)}
        case Diagonal() | Permutation() | Hadamard():
            return {"kind": type(weight).__name__.lower(), "shape": shape}
        case External(_, source, tensor):
            return {"kind": "external", "shape": shape, "source": source, "tensor": tensor}
        case _:
            raise UnsupportedWeight(f"{weight.describe()} has no stored form")


def unpack(
    spec: Spec,
    tensors: Mapping[str, Tensor],
    at: str = "",
    keep_OI: Tensor | None = None,
    resolve: Resolve | None = None,
) -> Weight:
    """The expression that `specify` and `pack` described.

    Raises ArtifactError if a tensor is missing or does not fit, or if the specification is malformed.
    """
    try:
        return _unpack(spec, tensors, at, keep_OI, resolve)
    except KeyError as error:
        raise ArtifactError(f"the specification or the file lacks {error.args[0]!r}") from error
    except (TypeError, ValueError, RuntimeError, IndexError, OverflowError, UnsupportedWeight) as error:
        if believable(spec, tensors):
            pass_on_memory(error)
        raise ArtifactError(f"a stored weight does not fit its specification: {error}") from error


def believable(spec: Spec, tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors of this size may hold a weight of the shape of a specification."""
    shape: Any = spec.get("shape")
    known = isinstance(shape, list | tuple) and all(isinstance(side, int) for side in shape)
    return known and prod(shape) <= PLAUSIBLE * sum(tensor.nbytes for tensor in tensors.values())


def sized(tensor: Tensor, *shapes: tuple[int, ...]) -> Tensor:
    """The tensor, if it has one of the shapes; raises ArtifactError otherwise."""
    if tuple(tensor.shape) not in shapes:
        raise ArtifactError(
            f"a stored tensor has shape {tuple(tensor.shape)}, expected {' or '.join(map(str, shapes))}"
        )
    return tensor


def _unpack(
    spec: Spec, tensors: Mapping[str, Tensor], at: str, keep_OI: Tensor | None, resolve: Resolve | None
) -> Weight:
    rows, columns = (int(n) for n in spec["shape"])

    def spread(t: Tensor, fill: Tensor) -> Tensor:
        if keep_OI is None:
            return t.view(rows, columns)
        whole = fill.expand(rows, columns).to(t.dtype).clone()
        return put(whole, keep_OI, sized(t, (kept,)))

    def below(child: Spec, name: str, keep: Tensor | None = None) -> Weight:
        return _unpack(child, tensors, f"{at}{name}.", keep, resolve)

    kept = rows * columns if keep_OI is None else kept_of(keep_OI)
    match spec["kind"]:
        case "dense":
            data = tensors[f"{at}data"]
            return Dense(spread(data, torch.zeros((), dtype=data.dtype, device=data.device)))
        case "quantized":
            return _unpack_quantized(spec, tensors, at, kept, spread)
        case "signs":
            positive = unpack_bits(tensors[f"{at}signs"], 1, kept).bool()
            scale = sized(tensors[f"{at}scale"], (1, 1), (rows, 1))
            return Signs(spread(positive, torch.zeros((), device=positive.device)), scale)
        case "scaled":
            data, (tile_rows, tile_columns) = tensors[f"{at}data"], (int(n) for n in spec["tile"])
            whole = data.view(rows, columns) if keep_OI is None else spread_bytes(data, keep_OI)
            return Scaled(whole, tensors[f"{at}scale"].view(spec["scales"]), tile_rows, tile_columns)
        case "codebook":
            return _unpack_codebook(spec, tensors, at, keep_OI, below(spec["scale"], "scale"))
        case "nested":
            blocks = -(-rows * columns // Nested.BLOCK)
            codes = spread(
                unpack_bits(tensors[f"{at}codes"], 8, kept), torch.zeros((), device=tensors[f"{at}codes"].device)
            )
            return Nested(codes, sized(tensors[f"{at}absmax"], (blocks,)), sized(tensors[f"{at}offset"], (1,)))
        case "masked":
            mask_OI = _unpack_mask(spec, tensors, at, (rows, columns))
            if [int(n) for n in spec["values"]["shape"]] != [rows, columns]:
                raise ArtifactError(f"values of {spec['values']['shape']} do not fit a mask of {rows}x{columns}")
            return Masked(below(spec["values"], "values", mask_OI), mask_OI, str(spec["pattern"]))
        case "sum":
            return Sum(tuple(below(term, f"terms.{i}") for i, term in enumerate(spec["terms"])))
        case "product":
            return Product(below(spec["left"], "left"), below(spec["right"], "right"))
        case "diagonal":
            return Diagonal(sized(tensors[f"{at}diagonal"], (rows,)))
        case "permutation":
            held = sized(tensors[f"{at}order"], (rows,))
            order = held.long()
            if held.dtype != torch.int32 or not torch.equal(
                order.sort().values, torch.arange(rows, device=order.device)
            ):
                raise ArtifactError("a stored order is not a permutation")
            return Permutation(order)
        case "hadamard":
            return Hadamard(unpack_bits(tensors[f"{at}signs"], 1, rows).bool())
        case "external":
            if resolve is None:
                raise ArtifactError(f"this weight needs its base {spec['source']!r}, which was not given")
            return External(resolve(spec["source"], spec["tensor"]), spec["source"], spec["tensor"])
        case other:
            raise ArtifactError(f"unknown kind of stored weight {other!r}; this file may need a newer version")


def _unpack_codebook(
    spec: Spec, tensors: Mapping[str, Tensor], at: str, keep_OI: Tensor | None, scale: Weight
) -> Codebook:
    named = isinstance(spec["book"], str)
    if named and spec["book"] not in BOOKS:
        raise ArtifactError(f"unknown table of values {spec['book']!r}; allowed: {', '.join(BOOKS)}")
    packed = tensors[f"{at}codes"]
    book = BOOKS[spec["book"]].to(packed.device) if named else tensors[f"{at}book"].view(spec["book"])
    rows, width = (int(n) for n in spec["codes"])
    dropped = keep_OI is not None and book.shape[1] == 1
    held = kept_of(keep_OI) if keep_OI is not None and dropped else rows * width
    codes = unpack_bits(packed, max(1, (book.shape[0] - 1).bit_length()), held)
    if held and int(codes.max()) >= book.shape[0]:
        raise ArtifactError(f"a code names entry {int(codes.max())} of a book of {book.shape[0]}")
    if keep_OI is not None and dropped:
        zero = int(book[:, 0].abs().argmin())  # a dropped entry reads as the code of zero, if the book has one
        codes = put(torch.full((rows, width), zero, dtype=codes.dtype, device=codes.device), keep_OI, codes)
    return Codebook(codes.view(rows, width), book, scale, spec["book"] if named else "")


def _unpack_mask(spec: Spec, tensors: Mapping[str, Tensor], at: str, shape: tuple[int, int]) -> Tensor:
    form, kept = spec.get("mask"), int(spec["kept"])
    if form != BY_NAME:
        mask_OI = unpack_mask(tensors[f"{at}mask"], form, shape, kept)
        if kept_of(mask_OI) != kept:
            raise ArtifactError(f"a mask keeps {kept_of(mask_OI)} entries, its specification says {kept}")
        return mask_OI
    device = next((t.device for name, t in tensors.items() if name.startswith(at)), torch.device("cpu"))
    likely = plausible(str(spec["pattern"]), shape[0] * shape[1], kept)  # checked before a mask is drawn
    drawn_OI = regenerated(str(spec["pattern"]), shape, device) if likely else None
    if drawn_OI is None or kept_of(drawn_OI) != kept:
        raise ArtifactError(f"no mask of {kept} entries is called {spec['pattern']!r}")
    return drawn_OI


def is_real(zero: Tensor) -> bool:
    """Whether a zero is a real number rather than a code."""
    return zero.is_floating_point()


def taken(data: Tensor, keep_OI: Tensor | None) -> Tensor:
    """The kept entries of a matrix of bytes, flat."""
    return data.reshape(-1) if keep_OI is None else take(data, keep_OI)


def spread_bytes(data: Tensor, keep_OI: Tensor) -> Tensor:
    """The inverse of `taken`, with 0 elsewhere."""
    whole = torch.zeros(keep_OI.shape, dtype=torch.uint8, device=data.device)
    return put(whole, keep_OI, sized(data, (kept_of(keep_OI),))).view(data.dtype)


def _unpack_quantized(
    spec: Spec, tensors: Mapping[str, Tensor], at: str, count: int, spread: Callable[[Tensor, Tensor], Tensor]
) -> Quantized:
    bits = int(spec["bits"])
    scales = [int(n) for n in spec["scales"]]
    scale = tensors[f"{at}scale"].view(scales)
    zero = None
    if not spec["symmetric"]:
        held = tensors[f"{at}zero"]
        zero = held.view(scales) if is_real(held) else unpack_bits(held, bits, scales[0] * scales[1]).view(scales)
    packed = unpack_bits(tensors[f"{at}codes"], bits, count)
    width = int(spec["shape"][1]) // scales[1]
    middle = torch.tensor(2 ** (bits - 1), device=scale.device)
    if zero is not None and packed.numel() < int(spec["shape"][0]) * int(spec["shape"][1]):
        middle = zero.round().clamp(0, 2**bits - 1).repeat_interleave(width, 1)
    return Quantized(spread(packed, middle), scale, zero, bits)  # a dropped entry reads as the code of zero
