"""Fuzz targets: functions of bytes that must succeed or raise a CompressError, with little time and memory.

The bytes describe edits of something valid, so that most inputs pass the first check. Not here: the fuzzing engines,
which are hypothesis in `test_fuzz.py` and atheris, if it is installed, in `run.py`.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import Artifact, is_artifact
from compress.errors import ArtifactError, CompressError
from compress.model.architecture import check_sizes
from compress.model.source import INDEX, SINGLE, Checkpoint
from compress.recipe import from_dict, parse
from compress.weights import (
    Codebook,
    Dense,
    Diagonal,
    Grid,
    Hadamard,
    Masked,
    Permutation,
    Product,
    Scaled,
    Signs,
    Sum,
    Weight,
    check_claims,
    pack,
    specify,
    unpack,
)
from compress.weights.bits import unpack_bits
from compress.weights.masks import unpack_mask

TOKENS = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"9" * 30,
    b"9" * 5000,
          b"\\ud800", b"\\u0000", b"\x1b", b"\xff", b"&a ", b"*a", b"!!", b"<<", b"---\n", b"? ", b"\n", b"[" * 200,
          b'{"a":' * 200,
          b"passes", b"rtn", b"shape", b"data_offsets", b"dtype", b"F64", b"../x", b"4294967296",
          b"9223372036854775807",
          b"quantization_config", b"weights", b"tensors", b"shared", b"kind", b"sum"]  # fmt: skip


class Reader:
    """Reads small numbers from bytes; gives 0 once they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, below: int) -> int:
        """A number of two bytes."""
        self.at += 2
        return int.from_bytes(self.data[self.at - 2 : self.at], "little") % max(1, below)

    def edits(self) -> Iterator[int]:
        """Yields the next edit as long as there are bytes."""
        while self.at < len(self.data):
            yield self.number(5)


def mutated(seed: bytes, data: bytes) -> bytes:
    """Valid content after the edits that `data` encodes."""
    content, read = bytearray(seed), Reader(data)
    for edit in read.edits():
        at = read.number(len(content) + 1)
        match edit:
            case 0:
                content[at : at + 1] = bytes([read.number(256)])
            case 1:
                del content[at : at + read.number(40)]
            case 2:
                content[at:at] = TOKENS[read.number(len(TOKENS))]
            case 3:
                content[at:at] = content[at : at + read.number(60)]
            case _:
                end = at + read.number(12)
                content[at:end] = TOKENS[read.number(len(TOKENS))]
    return bytes(content[: 1 << 20])


# -- recipes ---------------------------------------------------------------------------------------

RECIPE = b"""model: builtin
calibration: {data: mixed, samples: 8, length: 32, seed: 0}
ordering: site
passes:
- wanda: {sparsity: 2:4, sites: "*mlp*"}
- gptq: {bits: 4, group: 128}
limits: {max_untouched: 0.02, max_fallbacks: 0}
accept: {suite: facts, max_drop: 0.05, confidence: 0.95}
kv: {bits: 4, group: 32}
"""


def recipe(data: bytes) -> None:
    """Target: the recipe loader, on an edited recipe."""
    try:
        from_dict(parse(mutated(RECIPE, data).decode("utf-8")))
    except UnicodeDecodeError:  # `load` reports this for a file
        return


# -- folders ---------------------------------------------------------------------------------------


@cache
def weights() -> tuple[Weight, ...]:
    """One weight of each form, with 8 x 16 entries."""
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(8, 16, generator=generator)
    mask_OI, grid = torch.rand(8, 16, generator=generator) < 0.3, Grid(bits=4, group=8, symmetric=False)
    codes = torch.randint(0, 4, (8, 8), generator=generator)
    return (
        Dense(w_OI),
        grid.quantize(w_OI),
        Masked(grid.quantize(w_OI), mask_OI, "30%"),
        Sum((Masked(Dense(w_OI), mask_OI, "30%"), Product(Dense(w_OI[:, :3]), Dense(w_OI[:3])))),
        Product(Signs(w_OI > 0, torch.ones(8, 1)), Permutation(torch.randperm(16, generator=generator))),
        Product(Product(Diagonal(torch.ones(8)), Dense(w_OI)), Hadamard(w_OI[0] > 0)),
        Codebook(codes, torch.randn(4, 2, generator=generator), Dense(torch.ones(8, 1))),
        Scaled(w_OI.to(torch.float8_e4m3fn), torch.ones(8, 1), 1, 16),
    )


@cache
def folder() -> dict[str, bytes]:
    """The files of an artifact without a tokenizer, by name, with a site for each form and a norm."""
    tensors: dict[str, Tensor] = {"model.norm.weight": torch.ones(16)}
    specs: dict[str, Any] = {}
    for i, weight in enumerate(weights()):
        site, packed = f"model.layers.{i}.mlp.up_proj", pack(weight)
        named = {
            p: f"{site}.weight" if n == 0 else f"{site}.weight_{p.replace('.', '_')}" for n, p in enumerate(packed)
        }
        tensors |= {named[path]: tensor for path, tensor in packed.items()}
        held = [[path, str(t.dtype).removeprefix("torch."), list(t.shape)] for path, t in packed.items()]
        specs[site] = {"tree": specify(weight), "tensors": held, "name": weight.describe(), "transposed": False}
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": len(specs), "dtype": "float32",
              "quantization_config": {"quant_method": "compress", "version": 1, "weights": specs}}  # fmt: skip
    index = {"metadata": {}, "weight_map": dict.fromkeys(sorted(tensors), SINGLE)}
    return {"config.json": json.dumps(config).encode(), INDEX: json.dumps(index).encode(), SINGLE: written(tensors)}


def written(tensors: dict[str, Tensor]) -> bytes:
    """The bytes of a safetensors file."""
    with tempfile.TemporaryDirectory() as place:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, Path(place) / SINGLE)
        return (Path(place) / SINGLE).read_bytes()


def opened(files: dict[str, bytes]) -> None:
    """Read a folder as far as is possible without a model: headers, specifications, every weight."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place)
        for name, content in files.items():
            (path / name).write_bytes(content)
        source = Checkpoint(path)
        check_sizes(source.config, source.shapes())
        source.nbytes()
        if not is_artifact(path):
            return
        artifact = Artifact(path)
        artifact.shapes()
        for site in artifact.specs:
            artifact.expression(site).dense()


def config(data: bytes) -> None:
    """Target: the artifact reader, on an edited config.json."""
    opened(folder() | {"config.json": mutated(folder()["config.json"], data)})


def index(data: bytes) -> None:
    """Target: the checkpoint reader, on an edited index."""
    opened(folder() | {INDEX: mutated(folder()[INDEX], data)})


def header(data: bytes) -> None:
    """Target: the checkpoint reader, on an edited header with its length corrected, or on an edited whole file."""
    whole = folder()[SINGLE]
    (length,) = struct.unpack("<Q", whole[:8])
    if len(data) % 4 == 3:
        opened(folder() | {SINGLE: mutated(whole, data)})
        return
    text = mutated(whole[8 : 8 + length], data)
    opened(folder() | {SINGLE: struct.pack("<Q", len(text)) + text + whole[8 + length :]})


# -- unpackers -------------------------------------------------------------------------------------

VALUES: list[Any] = [0, 1, -1, 2, 3, 7, 8, 9, 16, 255, 2**31, 2**63, 10**30, 1.5, float("inf"), float("nan"), None,
    True, "", "name",
                     "sum", "dense", "e8p", "nf4", "rand0.5@7", [], [8, 16], [16, 8], [1, 1], [2**31, 2**31], {},
                     [-8, -16]]  # fmt: skip
KINDS = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.float16, torch.float32, torch.float64]


def places(spec: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a specification, with each of its keys."""
    for key in list(spec) if isinstance(spec, dict) else range(len(spec)):
        yield spec, key
        if isinstance(spec[key], (dict, list)):
            yield from places(spec[key])


def unpacked(data: bytes) -> None:
    """Target: the unpackers, on an edited specification and edited tensors."""
    read = Reader(data)
    weight = weights()[read.number(len(weights()))]
    spec, tensors = json.loads(json.dumps(specify(weight))), dict(pack(weight))
    for edit in read.edits():
        where, name = list(places(spec)), sorted(tensors)[read.number(len(tensors))]
        parent, key = where[read.number(len(where))]
        tensor = tensors[name]
        match edit:
            case 0 | 1:
                parent[key] = json.loads(json.dumps(VALUES[read.number(len(VALUES))]))
            case 2:
                other, field = where[read.number(len(where))]
                parent[key] = json.loads(json.dumps(other[field]))
            case 3:
                flat = tensor.reshape(-1)
                tensors[name] = flat[: read.number(len(flat) + 1)]
            case _:
                kind = KINDS[read.number(len(KINDS))]
                tensors[name] = (torch.arange(tensor.numel()).view(tensor.shape) * read.number(999)).to(kind)
    check_claims(spec, (8, 16))
    unpack(spec, tensors).dense()


def streams(data: bytes) -> None:
    """Target: the decoders of bit streams and masks, on any bytes."""
    read = Reader(data)
    bits, length, kept, form = read.number(16) + 1, read.number(300), read.number(400), VALUES[read.number(len(VALUES))]
    packed = torch.frombuffer(bytearray(data[8:] or b"\0"), dtype=torch.uint8)
    for attempt in (lambda: unpack_bits(packed, bits, length), lambda: unpack_mask(packed, form, (length, 7), kept)):
        try:
            attempt()
        except ArtifactError:
            continue


TARGETS: dict[str, Callable[[bytes], None]] = {
    "recipe": recipe, "config": config, "index": index, "header": header, "unpacked": unpacked, "streams": streams,
}  # fmt: skip


def held(target: Callable[[bytes], None], data: bytes) -> bool:
    """Whether a target accepted the bytes; False if it refused them in one line. Anything else is a finding."""
    try:
        target(data)
    except CompressError as error:
        assert str(error).isprintable()
        return False
    return True
