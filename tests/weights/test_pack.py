"""The codec: bit streams of every width; damaged or nonsensical files are refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import ArtifactError, CompressError, UnsupportedWeight
from compress.weights import (
    BOOKS,
    Codebook,
    Dense,
    Diagonal,
    External,
    Grid,
    Hadamard,
    Masked,
    Nested,
    Permutation,
    Product,
    Scaled,
    Signs,
    Sum,
    Weight,
    pack,
    specify,
    unpack,
)  # fmt: skip
from compress.weights.bits import pack_bits, packed_size, unpack_bits
from compress.weights.chance import regenerated

LENGTHS = (0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 100, 4097)


def values(bits: int, count: int) -> Tensor:
    return torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(bits))


# -- bit streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("bits", range(1, 13))
def test_values_come_back_from_the_stream(bits: int, count: int) -> None:
    original = values(bits, count)
    packed = pack_bits(original, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_size(count, bits)
    assert unpack_bits(packed, bits, count).tolist() == original.tolist()


@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("bits", range(1, 13))
def test_the_stream_is_the_documented_one(bits: int, count: int, naive: ModuleType) -> None:
    original = values(bits, count)
    assert bytes(pack_bits(original, bits).tolist()) == naive.pack_stream(original.tolist(), bits)


@given(st.data())
def test_any_values_of_any_width_come_back(data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, 12))
    original = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack_bits(torch.tensor(original, dtype=torch.int32), bits)
    assert unpack_bits(packed, bits, len(original)).tolist() == original


def test_lowest_bits_come_first() -> None:
    assert pack_bits(torch.tensor([1, 2, 3]), 2).tolist() == [0b111001]
    assert pack_bits(torch.tensor([True, False, True]), 1).tolist() == [0b101]


@pytest.mark.parametrize("bits", range(1, 13))
@pytest.mark.parametrize("extra", [-1, 1])
def test_a_stream_of_another_length_is_refused(bits: int, extra: int) -> None:
    packed = pack_bits(values(bits, 100), bits)
    other = packed[:-1] if extra < 0 else torch.cat((packed, packed[:1]))
    with pytest.raises(ArtifactError, match="a packed tensor holds"):
        unpack_bits(other, bits, 100)


def test_a_stream_of_another_dtype_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"torch\.int8 entries; expected 50 uint8"):
        unpack_bits(torch.zeros(50, dtype=torch.int8), 4, 100)


# -- damaged files ---------------------------------------------------------------------------------


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def mask() -> Tensor:
    return normal(6, 16) > 0


def by_name() -> Masked:
    mask_OI = regenerated("rand0.3@5", (6, 16), torch.device("cpu"))
    assert mask_OI is not None
    return Masked(Dense(normal(6, 16)), mask_OI, "rand0.3@5")


WHOLE: dict[str, Weight] = {
    "dense": Dense(normal(6, 16)),
    "quantized": Grid(bits=4, group=8).quantize(normal(6, 16)),
    "symmetric": Grid(bits=3, group=8, symmetric=True).quantize(normal(6, 16)),
    "signs": Signs(normal(6, 16) > 0, normal(6, 1)),
    "real-zero": replace(Grid(bits=4, group=8).quantize(normal(6, 16)), zero=normal(6, 2).half()),
    "codebook": Codebook(torch.randint(10, (6, 4)), normal(10, 4), Dense(normal(6, 1))),
    "nf4": Codebook(torch.randint(16, (6, 16)), BOOKS["nf4"], Dense(normal(6, 2)), "nf4"),
    "nested": Nested(torch.randint(256, (6, 50), dtype=torch.uint8), normal(2), normal(1)),
    "e8p": Codebook(torch.randint(1 << 16, (6, 2)), BOOKS["e8p"], Dense(normal(6, 1)), "e8p"),
    "scaled": Scaled(normal(6, 16).to(torch.float8_e4m3fn), normal(3, 2), 2, 8),
    "masked": Masked(Dense(normal(6, 16)), mask(), "50%"),
    "masked-few": Masked(Dense(normal(6, 16)), normal(6, 16) > 1.3, "85%"),
    "masked-by-name": by_name(),
    "masked-quantized": Masked(Grid(bits=4, group=8).quantize(normal(6, 16)), mask(), "50%"),
    "product": Dense(normal(6, 2)) @ Dense(normal(2, 16)),
    "sum": Dense(normal(6, 16)) + Signs(normal(6, 16) > 0, normal(1, 1)),
    "diagonal": Diagonal(normal(16)),
    "permutation": Permutation(normal(16).argsort()),
    "hadamard": Hadamard(normal(16) > 0),
}
PARTS = [(name, key) for name, weight in WHOLE.items() for key in pack(weight)]
parts = pytest.mark.parametrize(("name", "key"), PARTS)


@parts
def test_a_missing_tensor_is_refused(name: str, key: str) -> None:
    packed = pack(WHOLE[name])
    del packed[key]
    with pytest.raises(ArtifactError, match=rf"the specification or the file lacks '{key}'"):
        unpack(specify(WHOLE[name]), packed)


@parts
def test_a_truncated_tensor_is_refused(name: str, key: str) -> None:
    packed = pack(WHOLE[name])
    packed[key] = packed[key].reshape(-1)[:-1]
    with pytest.raises(ArtifactError):
        unpack(specify(WHOLE[name]), packed)


@parts
def test_a_tensor_cut_to_one_entry_is_refused_or_harmless(name: str, key: str) -> None:
    packed = pack(WHOLE[name])
    packed[key] = packed[key].reshape(-1)[:1]
    try:
        weight = unpack(specify(WHOLE[name]), packed)
    except ArtifactError:
        return
    assert torch.equal(weight.dense(), WHOLE[name].dense())


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("key", ["kind", "shape"])
def test_a_specification_without_its_basics_is_refused(name: str, key: str) -> None:
    spec = specify(WHOLE[name])
    del spec[key]
    with pytest.raises(ArtifactError, match=f"lacks '{key}'"):
        unpack(spec, pack(WHOLE[name]))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("shape", [None, [], [6], [6, 16, 1], "6x16", [0, 0], [-6, 16], ["a", "b"], [10**9, 10**9]])
def test_a_specification_with_another_shape_is_refused_or_not_believed(name: str, shape: Any) -> None:
    spec = {**specify(WHOLE[name]), "shape": shape}
    try:
        weight = unpack(spec, pack(WHOLE[name]))
    except ArtifactError:
        return
    assert weight.shape == WHOLE[name].shape


def test_memory_that_runs_out_is_not_the_fault_of_a_plausible_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(sys.modules["compress.weights.pack"], "unpack_bits", fail)
    spec, held = specify(WHOLE["quantized"]), pack(WHOLE["quantized"])
    with pytest.raises(MemoryError, match="allocate memory"):
        unpack(spec, held)
    with pytest.raises(ArtifactError, match="allocate memory"):
        unpack({**spec, "shape": [60_000, 60_000]}, held)


MALFORMED = [
    ("quantized", {"bits": 0}),
    ("quantized", {"bits": "four"}),
    ("quantized", {"bits": 3}),
    ("quantized", {"bits": -4}),
    ("quantized", {"bits": None}),
    ("quantized", {"scales": [6, 3]}),
    ("quantized", {"scales": []}),
    ("quantized", {"scales": [6, 0]}),
    ("quantized", {"scales": None}),
    ("codebook", {"book": [10, 5]}),
    ("codebook", {"codes": [6]}),
    ("codebook", {"codes": [6, 5]}),
    ("codebook", {"book": []}),
    ("nested", {"shape": [6, 51]}),
    ("nested", {"shape": [60, 50]}),
    ("masked", {"values": None}),
    ("masked", {"values": {"kind": "dense"}}),
    ("product", {"left": None}),
    ("product", {"right": {"kind": "dense", "shape": [3, 16]}}),
    ("sum", {"terms": None}),
    ("dense", {"kind": "zip"}),
    ("dense", {"kind": None}),
    ("dense", {"kind": ["dense"]}),
]
WRONG_KIND = [
    ("sum", {"terms": []}), ("quantized", {"scales": [4, 3]}), 
    ("product", {"left": {"kind": "dense", "shape": [4, 3]}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), MALFORMED, ids=str)
def test_a_malformed_specification_is_refused(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        unpack({**specify(WHOLE[name]), **change}, pack(WHOLE[name]))


@pytest.mark.parametrize(("name", "change"), WRONG_KIND, ids=str)
def test_a_specification_the_nodes_refuse_is_an_artifact_error(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        unpack({**specify(WHOLE[name]), **change}, pack(WHOLE[name]))


def test_scales_of_one_dimension_are_refused() -> None:
    with pytest.raises(ArtifactError):
        unpack({**specify(WHOLE["quantized"]), "scales": [12]}, pack(WHOLE["quantized"]))


@pytest.mark.parametrize(
    ("weight", "packed"),
    [
        (Permutation(torch.arange(4)), {"order": torch.tensor([0, 1, 2, 9], dtype=torch.int32)}),
        (
            Codebook(torch.tensor([[9]]), normal(10, 2), Dense(normal(1, 1))),
            {"codes": torch.tensor([15], dtype=torch.uint8)},
        ),
    ],
    ids=["permutation", "codebook"],
)
def test_an_index_out_of_range_is_an_artifact_error(weight: Weight, packed: dict[str, Tensor]) -> None:
    with pytest.raises(ArtifactError):
        unpack(specify(weight), {**pack(weight), **packed}).dense()


def test_a_specification_nested_without_end_is_refused() -> None:
    spec: dict[str, Any] = {"kind": "dense", "shape": [1, 1]}
    for _ in range(5000):
        spec = {"kind": "sum", "shape": [1, 1], "terms": [spec]}
    with pytest.raises(ArtifactError):
        unpack(spec, {})


def test_an_external_weight_needs_its_base() -> None:
    weight = External(normal(6, 16), "some/base", "proj.weight")
    with pytest.raises(ArtifactError, match="this weight needs its base 'some/base', which was not given"):
        unpack(specify(weight), pack(weight))


def test_an_unknown_node_has_no_stored_form() -> None:
    class Stranger(Weight):
        shape = (1, 1)

    with pytest.raises(UnsupportedWeight, match="stranger has no stored form"):
        pack(Stranger())
    with pytest.raises(UnsupportedWeight, match="stranger has no stored form"):
        specify(Stranger())


def test_every_refusal_is_a_compress_error() -> None:
    assert issubclass(ArtifactError, CompressError)


# -- what is stored --------------------------------------------------------------------------------


def test_pruned_entries_take_no_bytes() -> None:
    quantized = Grid(bits=4, group=8).quantize(normal(6, 16))
    keep_OI = torch.tensor([True, False] * 48).view(6, 16)
    stored = {key: t.nbytes for key, t in pack(Masked(quantized, keep_OI, "2:4")).items()}
    assert stored == {"values.codes": 24, "values.scale": 24, "values.zero": 6, "mask": 12}


def test_the_first_payload_is_flat() -> None:
    firsts = {name: next(iter(pack(weight).values())) for name, weight in WHOLE.items()}
    assert {name: t.ndim for name, t in firsts.items()} == dict.fromkeys(WHOLE, 1)


def test_a_pruned_code_reads_as_the_zero_of_its_table() -> None:
    keep_OI = torch.tensor([True, False] * 48).view(6, 16)
    weight = Masked(WHOLE["nf4"], keep_OI, "2:4")
    values = unpack(specify(weight), pack(weight)).values
    assert int(values.dense()[~keep_OI].count_nonzero()) == 0


def test_an_external_weight_stores_nothing() -> None:
    assert pack(External(normal(6, 16), "base", "w")) == {}


# -- nodes check their parts -----------------------------------------------------------------------


def test_a_sum_needs_one_shape() -> None:
    with pytest.raises(UnsupportedWeight, match="a sum needs terms of one shape"):
        Sum((Dense(normal(6, 16)), Dense(normal(16, 6))))


def test_a_product_needs_matching_inner_sizes() -> None:
    with pytest.raises(UnsupportedWeight, match=r"matching inner sizes; got \(6, 3\) @ \(2, 16\)"):
        Product(Dense(normal(6, 3)), Dense(normal(2, 16)))


def test_a_mask_needs_the_shape_of_its_values() -> None:
    with pytest.raises(UnsupportedWeight, match=r"a mask of \(16, 6\) does not fit values of \(6, 16\)"):
        Masked(Dense(normal(6, 16)), normal(16, 6) > 0, "50%")


def test_a_mask_hides_values_that_are_not_finite() -> None:
    data = normal(2, 4)
    data[0, 0] = float("nan")
    mask_OI = torch.ones(2, 4, dtype=torch.bool)
    mask_OI[0, 0] = False
    assert float(Masked(Dense(data), mask_OI, "50%").dense()[0, 0]) == 0


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        (Dense(normal(6, 16)), "dense"),
        (Masked(Dense(normal(6, 16)), mask(), "2:4"), "2:4"),
        (Masked(WHOLE["quantized"], mask(), "2:4") + WHOLE["product"], "2:4·int4g8 + r2"),
        (Product(WHOLE["quantized"], WHOLE["diagonal"]), "int4g8@diag"),
        (WHOLE["signs"], "sign"),
        (WHOLE["codebook"], "vq4x4"),
    ],
    ids=["dense", "masked", "sum", "product", "signs", "codebook"],
)
def test_an_expression_is_named_as_the_design_says(weight: Weight, name: str) -> None:
    assert weight.describe() == name
