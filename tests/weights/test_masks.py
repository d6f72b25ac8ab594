"""Stored masks: gaps if few entries are kept, nothing if the name determines the mask, else one bit per entry."""

from __future__ import annotations

from math import log2
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress import RTN, ArtifactError, Dense, Magnitude, Masked
from compress.weights import pack, pattern, specify, unpack
from compress.weights.bits import packed_size
from compress.weights.chance import LOW, numbers, regenerated, rule_name, scrambled
from compress.weights.masks import BY_NAME, form_of, likely_bytes, mask_bytes, pack_mask, unpack_mask

CPU = torch.device("cpu")


def chosen(density: float, rows: int = 256, columns: int = 1024, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def entropy(p: float) -> float:
    """Bits an entry."""
    return -p * log2(p) - (1 - p) * log2(1 - p)


# -- gaps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.001, 0.01, 0.03, 0.1, 0.2, 0.3])
def test_few_entries_cost_about_their_entropy(density: float) -> None:
    """At most an eighth of a bit a kept entry above it; for rare ones the entropy tends to log2(1/p) + 1.44."""
    mask_OI = chosen(density)
    kept = float(mask_OI.float().mean())
    bits = 8 * mask_bytes(mask_OI, form_of(mask_OI, "any")) / mask_OI.numel()
    assert entropy(kept) < bits + 1e-3  # of the draw itself
    assert bits < entropy(kept) + kept / 8
    if density <= 0.03:
        assert bits / kept < log2(1 / kept) + 1.6


@pytest.mark.parametrize("mask", [chosen(0.5), chosen(0.45), ~chosen(0.1), pattern("2:4").keep(torch.rand(8, 64))])
def test_many_entries_are_a_bitmap(mask: Tensor) -> None:
    assert form_of(mask, "any") is None
    assert "mask" not in specify(Masked(Dense(mask.float()), mask, "any"))


@given(st.data())
def test_any_mask_in_any_width_is_read_back(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70))
    places = data.draw(st.sets(st.integers(0, rows * columns - 1)))
    width = data.draw(st.integers(1, 24))
    mask_OI = torch.zeros(rows * columns, dtype=torch.bool)
    mask_OI[sorted(places)] = True
    packed = pack_mask(mask_OI.view(rows, columns), width)
    assert packed is not None
    assert packed.nbytes == mask_bytes(mask_OI.view(rows, columns), width)
    assert torch.equal(unpack_mask(packed, width, (rows, columns), len(places)), mask_OI.view(rows, columns))


@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 0.4])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (63, 100), (3, 4097)])
def test_the_stream_is_the_documented_one(density: float, shape: tuple[int, int], naive: ModuleType) -> None:
    mask_OI = chosen(density, *shape)
    for width in (1, 3, 9):
        packed = pack_mask(mask_OI, width)
        assert packed is not None
        assert bytes(packed.tolist()) == naive.pack_gaps(mask_OI.flatten().tolist(), width)


@pytest.mark.parametrize("density", [0.002, 0.05, 0.2, 0.37, 0.45])
def test_the_form_is_the_smallest_of_all(density: float) -> None:
    mask_OI = chosen(density, 64, 300)
    sizes = {width: mask_bytes(mask_OI, width) for width in (None, *range(1, 25))}
    assert sizes[form_of(mask_OI, "any")] == min(sizes.values())


def test_a_mask_that_keeps_nothing_takes_nothing() -> None:
    mask_OI = chosen(0.0, 63, 100)
    assert likely_bytes(0, mask_OI.numel(), "100%") == mask_bytes(mask_OI, form_of(mask_OI, "100%")) == 0


def sparse() -> Masked:
    return Masked(Dense(torch.ones(63, 100)), chosen(0.1, 63, 100), "any")


@pytest.mark.parametrize("form", [0, -1, 25, 1000, "gaps", [3], 2.0, {"low": 3}, None, BY_NAME], ids=str)
def test_another_form_is_refused(form: Any) -> None:
    assert specify(sparse())["mask"] == 3
    with pytest.raises(ArtifactError):
        unpack({**specify(sparse()), "mask": form}, pack(sparse()))


@pytest.mark.parametrize("kept", [-1, 0, 1, 6301, 10**12, None, "all"], ids=str)
def test_another_count_is_refused(kept: Any) -> None:
    with pytest.raises(ArtifactError):
        unpack({**specify(sparse()), "kept": kept}, pack(sparse()))


def test_an_entry_beyond_the_matrix_is_refused() -> None:
    packed = pack(sparse())
    with pytest.raises(ArtifactError, match=r"a mask keeps entry 62.. of 6200"):
        unpack({**specify(sparse()), "shape": [62, 100], "values": {**specify(sparse())["values"]}}, packed)


@given(st.binary(max_size=60), st.integers(0, 40), st.integers(-2, 26))
def test_any_bytes_are_a_mask_of_that_count_or_refused(content: bytes, kept: int, width: int) -> None:
    packed = torch.tensor(list(content), dtype=torch.uint8)
    try:
        mask_OI = unpack_mask(packed, width, (5, 40), kept)
    except ArtifactError:
        return
    assert int(mask_OI.sum()) == kept
    again = pack_mask(mask_OI, width)
    assert again is not None
    assert len(again) == len(packed)


def test_a_long_run_of_zeros_is_out_of_range() -> None:
    packed = torch.cat(
        (torch.zeros(3, dtype=torch.uint8), torch.zeros(1 << 16, dtype=torch.uint8), torch.tensor([128]))
    )
    with pytest.raises(ArtifactError, match="a mask keeps entry"):
        unpack_mask(packed.to(torch.uint8), 24, (5, 40), 1)


def test_top_entries_of_a_matrix_rounded_to_four_bits_take_what_entropy_says(site_of: Any) -> None:
    """3 % kept: 0.194 bits of places and 0.12 of codes, beside a grid for each row."""
    w_OI = torch.randn(256, 2048, generator=torch.Generator().manual_seed(1))
    site = site_of(w_OI)
    site.weight = Magnitude(sparsity=0.97, scope="matrix").rewrite(site)
    weight = RTN(bits=4, group=0).rewrite(site)
    assert isinstance(weight, Masked)
    grids = packed_size(256, 4) + 2 * 256
    bits = 8 * (weight.nbytes() - grids) / w_OI.numel()
    assert entropy(0.03) + 0.12 < bits < 1.02 * (entropy(0.03) + 0.12)


# -- by name ---------------------------------------------------------------------------------------


def by_name(density: float = 0.1, seed: int = 7, rows: int = 63, columns: int = 100) -> Masked:
    name = rule_name(density, seed)
    mask_OI = regenerated(name, (rows, columns), CPU)
    assert mask_OI is not None
    return Masked(Dense(torch.randn(rows, columns)), mask_OI, name)


def test_a_mask_that_its_name_says_takes_no_bytes() -> None:
    weight = by_name()
    assert list(pack(weight)) == ["values.data"]
    assert weight.nbytes() == 4 * int(weight.mask_OI.sum())
    assert weight.describe() == "rand0.1"


def test_a_mask_that_was_changed_afterwards_is_stored() -> None:
    weight = by_name()
    mask_OI = weight.mask_OI.clone()
    mask_OI[5, 5] ^= True
    changed = Masked(weight.values, mask_OI, weight.pattern)
    assert "mask" in pack(changed)
    assert torch.equal(unpack(specify(changed), pack(changed)).mask_OI, mask_OI)


def test_the_name_survives_a_quantizer(site_of: Any) -> None:
    weight = by_name()
    site = site_of(weight.values.dense())
    site.weight = weight
    rounded = RTN(bits=4, group=0).rewrite(site)
    assert list(pack(rounded)) == ["values.codes", "values.scale", "values.zero"]
    assert rounded.describe() == "rand0.1·int4row"


@pytest.mark.parametrize(
    "name",
    ["50%", "rand0.1", "rand0.2@7", "rand0.1@8", "rand1e9@7", "rand-1@7", "rand0.1@99999999999", "rand0." + "1" * 40],
)
def test_a_name_that_says_another_mask_or_none_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match=r"no mask of .* entries is called"):
        unpack({**specify(by_name()), "pattern": name}, pack(by_name()))


def test_a_matrix_of_another_shape_is_refused() -> None:
    for shape in ([63, 101], [100, 63], [0, 0], [-63, 100], [10**9, 10**9]):
        with pytest.raises(ArtifactError):
            unpack({**specify(by_name()), "shape": shape}, pack(by_name()))


# -- numbers ---------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_plain_integers(naive: ModuleType) -> None:
    """Also beyond the 32nd bit of the counter."""
    for start in (0, 12345, (1 << 32) - 5, 3 << 32):
        want = [naive.number(i, 0xDEADBEEF) for i in range(start, start + 20)]
        assert numbers(start, start + 20, 0xDEADBEEF, CPU).tolist() == want


def test_the_numbers_never_change() -> None:
    """Files depend on them."""
    assert numbers(0, 4, 0, CPU).tolist() == [909259875, 2999562987, 3198675273, 2706596828]


def test_parts_are_parts_of_the_whole() -> None:
    whole = numbers(0, 1000, 3, CPU)
    assert torch.equal(torch.cat((numbers(0, 333, 3, CPU), numbers(333, 1000, 3, CPU))), whole)


def test_no_two_numbers_are_scrambled_to_one() -> None:
    assert scrambled(torch.arange(1 << 16)).unique().numel() == 1 << 16
    assert scrambled(torch.arange(LOW - 1000, LOW + 1)).unique().numel() == 1001


def test_each_bit_of_the_counter_changes_half_of_the_bits_of_the_number() -> None:
    """Within six standard deviations of what a random function does, on 4096 counters."""
    count, drawn = torch.arange(4096), numbers(0, 1 << 20, 1, CPU)
    for bit in range(20):
        changed = drawn[count] ^ drawn[count ^ (1 << bit)]
        for at in range(32):
            share = float(((changed >> at) & 1).float().mean())
            assert abs(share - 0.5) < 6 * 0.5 / 4096**0.5


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5])
def test_masks_keep_their_share_and_do_not_depend_on_each_other(density: float) -> None:
    """Neighbours in a row and in a column, and masks of seeds that differ in one bit: six standard deviations."""
    masks = [regenerated(rule_name(density, seed), (512, 512), CPU) for seed in (4, 5, 4 ^ (1 << 31))]
    assert all(mask is not None for mask in masks)
    first = masks[0].double()
    noise = 6 / first.numel() ** 0.5
    spread = (density * (1 - density)) ** 0.5
    assert abs(float(first.mean()) - density) < noise * spread
    off = [(mask.double() - density) / spread for mask in masks]
    pairs = [(off[0][:, 1:], off[0][:, :-1]), (off[0][1:], off[0][:-1]), (off[0], off[1]), (off[0], off[2])]
    assert all(abs(float((one * other).mean())) < noise for one, other in pairs)


def test_a_density_is_exact_in_decimal() -> None:
    assert rule_name(0.1, 7) == "rand0.1@7"
    assert rule_name(1.0, 7) == "rand1@7"
    assert rule_name(1e-5, 7) == "rand0.00001@7"
    mask_OI = regenerated("rand1@7", (9, 9), CPU)
    assert mask_OI is not None
    assert bool(mask_OI.all())
