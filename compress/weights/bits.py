"""Packed streams of fixed-width integers, end to end, lowest bit first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import ArtifactError

WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer dtypes by size in bytes


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """A flat uint8 tensor holding `values` (below 2**bits) end to end, `bits` each, lowest bit first.

    Above 8 bits there are two streams, one after the other: the low bytes, then the remaining bits.
    """
    flat = values.reshape(-1)
    if bits == 1 and flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.detach().numpy().astype(bool, copy=False), bitorder="little"))
    if bits == 8:
        return flat.to(torch.uint8)
    if bits > 8:  # two planes: the low bytes, then the rest
        wide = flat.long()
        return torch.cat((pack_bits(wide & 255, 8), pack_bits(wide >> 8, bits - 8)))
    if 8 % bits == 0:
        per = 8 // bits
        wide = aligned(flat.to(torch.uint8), per).view(WIDE[per])  # value i is in byte i; each is shifted to its place
        joined = wide
        for i in range(1, per):
            joined = joined | (wide >> (8 - bits) * i)
        return joined.to(torch.uint8)
    eights = F.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8).long()
    words = torch.sum(eights << (torch.arange(8, device=flat.device) * bits), 1)  # 8 * bits <= 56 bits
    octets: Tensor = (words[:, None] >> (torch.arange(bits, device=flat.device) * 8)) & 255
    packed: Tensor = octets.to(torch.uint8).reshape(-1)[: packed_size(len(flat), bits)]
    return packed.contiguous()


def aligned(flat: Tensor, to: int) -> Tensor:
    """A flat tensor that starts at a multiple of `to` bytes, padded with zeros to whole words of `to` bytes."""
    if not len(flat):
        return torch.zeros_like(flat, memory_format=torch.contiguous_format)
    if len(flat) % to:
        return F.pad(flat, (0, -len(flat) % to))
    return flat.contiguous() if flat.storage_offset() % to == 0 else flat.clone()


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take."""
    return count + packed_size(count, bits - 8) if bits > 8 else -(-count * bits // 8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` values of a stream made by `pack_bits`: uint8, or int32 above 8 bits.

    Raises ArtifactError if the stream has another length.
    """
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(count, bits):
        raise ArtifactError(
            f"a packed tensor holds {packed.numel()} {packed.dtype} entries; expected {packed_size(count, bits)} uint8"
        )
    if bits == 1 and packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little"))
    if bits == 8:
        return packed.clone()
    if bits > 8:
        low, high = unpack_bits(packed[:count], 8, count), unpack_bits(packed[count:], bits - 8, count)
        return low.int() | (high.int() << 8)
    if 8 % bits == 0:
        per = 8 // bits
        word = packed.to(WIDE[per])
        spread = word
        for i in range(1, per):
            spread = spread | (word << (8 - bits) * i)
        spread &= sum((2**bits - 1) << 8 * i for i in range(per))
        return spread.view(torch.uint8)[:count].contiguous()
    octets = F.pad(packed, (0, -len(packed) % bits)).view(-1, bits).long()
    words = (octets << (torch.arange(bits, device=packed.device) * 8)).sum(1)
    values: Tensor = (words[:, None] >> (torch.arange(8, device=packed.device) * bits)) & (2**bits - 1)
    return values.to(torch.uint8).reshape(-1)[:count].contiguous()
