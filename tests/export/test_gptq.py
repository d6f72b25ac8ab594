"""GPTQ's layout, read by an unpacker written from its definition, and by the stock loader if that is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress import GPTQ, RTN, Magnitude, RecipeError, UnsupportedWeight
from compress.artifact import Artifact
from compress.export import export
from compress.model.source import Checkpoint
from compress.passes import HQQ, NF4, Int8

CASES = {
    "int4": [RTN(bits=4, group=32, symmetric=True)],
    "int4 zeros": [RTN(bits=4, group=32)],
    "int2 zeros": [RTN(bits=2, group=16)],
    "int8": [RTN(bits=8, group=0, symmetric=True)],
    "int8 of one scale": [RTN(bits=8, group=-1)],
    "act-order": [GPTQ(bits=4, group=32, symmetric=True)],
    "pruned": [Magnitude(sparsity="2:4"), RTN(bits=4, group=32)],
}


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


def fields(word: int, bits: int) -> list[int]:
    """The values in a 32-bit word, lowest first."""
    return [(word >> shift) & (2**bits - 1) for shift in range(0, 32, bits)]


def decoded(stored: Checkpoint, site: str, told: dict[str, Any]) -> Tensor:
    """w[out, in] = scale[g] * (code - zero[g]), g = g_idx[in]; version 1 stores zero - 1."""
    bits, shift = told["bits"], 1 if told["checkpoint_format"] == "gptq" else 0
    qweight, qzeros = stored.tensor(f"{site}.qweight"), stored.tensor(f"{site}.qzeros")
    codes = torch.tensor([[fields(word, bits) for word in row] for row in qweight.T.tolist()]).flatten(1)  # [out, in]
    zeros = torch.tensor([[fields(word, bits) for word in row] for row in qzeros.tolist()]).flatten(1)  # [groups, out]
    groups = stored.tensor(f"{site}.g_idx").long()
    scale = stored.tensor(f"{site}.scales").float()
    return (scale[groups] * (codes.T - zeros[groups] - shift)).T


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_layout_reads_as_the_artifact(case: str, artifact_of: Any, tmp_path: Path) -> None:
    artifact = artifact_of(CASES[case])
    out = export(artifact, "gptq", tmp_path / "out").out
    meant, stored, told = Artifact(artifact), Checkpoint(out), config_of(out)
    for site in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        assert torch.equal(decoded(stored, site, told), meant.expression(site).dense())


@pytest.mark.slow
def test_a_zero_of_0_makes_it_version_2(artifact_of: Any, leaves: Any, tmp_path: Path) -> None:
    first = config_of(export(artifact_of([leaves(kind="int4-zeros")]), "gptq", tmp_path / "1").out)
    second = config_of(export(artifact_of([leaves(kind="int4-positive")]), "gptq", tmp_path / "2").out)
    assert (first["checkpoint_format"], first["sym"]) == ("gptq", False)
    assert (second["checkpoint_format"], second["sym"]) == ("gptq_v2", False)


def test_only_the_modules_that_are_quantized_are_named(small: Any, artifact_of: Any, tmp_path: Path) -> None:
    artifact = artifact_of([RTN(bits=4, group=32, symmetric=True, sites="*mlp*"), Magnitude(sites="*attn*")])
    told = config_of(export(artifact, "gptq", tmp_path / "some").out)
    every = config_of(export(artifact_of(CASES["int4"]), "gptq", tmp_path / "all").out)
    assert told["modules_in_block_to_quantize"] == [["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]]
    assert "modules_in_block_to_quantize" not in every


def test_only_blocks_of_the_language_model_count(llava: Path, artifact_of: Any, tmp_path: Path) -> None:
    """The vision tower has another number of blocks, whose matrices are not quantized and have the same names."""
    every = export(artifact_of(CASES["int4"], llava), "gptq", tmp_path / "all").out
    some = [RTN(bits=4, group=32, symmetric=True, sites="*q_proj"), Magnitude(sites="*[kvo]_proj")]
    told, named = config_of(every), config_of(export(artifact_of(some, llava), "gptq", tmp_path / "some").out)
    assert told["block_name_to_quantize"] == "model.language_model.layers"
    assert "modules_in_block_to_quantize" not in told
    assert named["modules_in_block_to_quantize"] == [["self_attn.q_proj"]]
    site = "language_model.model.layers.1.mlp.down_proj"
    meant = Artifact(artifact_of(CASES["int4"], llava)).expression(site).dense()
    assert torch.equal(decoded(Checkpoint(every), site, told), meant)


def test_blocks_that_the_model_ignores_do_not_count(small: Any, artifact_of: Any, tmp_path: Path) -> None:
    """Such as those that predict further tokens."""
    folder = shutil.copytree(small(), tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    held["mtp.layers.0.mlp.up_proj.weight"] = torch.ones(128, 64)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    told = config_of(export(artifact_of(CASES["int4"], folder), "gptq", tmp_path / "out").out)
    assert "modules_in_block_to_quantize" not in told


REFUSED: dict[str, tuple[Any, str]] = {
    "3 bits": ([RTN(bits=3, group=32)], "use bits: 2, 4 or 8"),
    "a group unknown to loaders": ([RTN(bits=4, group=8)], "loaders do not support groups of 8"),
    "two widths": (
        [RTN(bits=4, group=32, sites="*mlp*"), RTN(bits=8, group=32, sites="*attn*")],
        "one width and group",
    ),
    "rounded inputs": ([RTN(bits=8, group=0, symmetric=True, inputs="int8")], "do not round inputs"),
    "some blocks": ([RTN(bits=4, group=32, sites="*layers.0.*"), Magnitude(sites="*layers.1.*")], "some blocks only"),
    "real zeros": ([HQQ(bits=4, group=32)], "its zero points are integers"),
    "scales of float32": ([Int8()], "its scales are float16"),
    "nf4": ([NF4()], r"nf4row\): gptq cannot represent it"),
    "one block": ([RTN(bits=4, group=32, sites="*layers.0.*")], "some blocks only"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_say_is_refused_by_name(case: str, artifact_of: Any, tmp_path: Path) -> None:
    passes, match = REFUSED[case]
    artifact = artifact_of(passes)
    with pytest.raises(UnsupportedWeight, match=match):
        export(artifact, "gptq", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_quantized_is_nothing_to_say(artifact_of: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no site is quantized"):
        export(artifact_of([Magnitude()]), "gptq", tmp_path / "out")


@pytest.mark.parametrize("case", ["int4", "int4 zeros", "int2 zeros"])
def test_stock_transformers_loads_it(
    case: str, artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    artifact = artifact_of(CASES[case])
    out = export(artifact, "gptq", tmp_path / "out").out
    found = logits(stock(out, torch.float16, device_map="cpu"))
    assert_close("logits", found, logits(compress.load(artifact)), 0.01)  # it computes in float16


def test_stock_transformers_loads_a_vision_language_model(
    llava: Path, artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    artifact = artifact_of(CASES["int4"], llava)
    out = export(artifact, "gptq", tmp_path / "out").out
    found = logits(stock(out, torch.float16, auto="AutoModelForImageTextToText", device_map="cpu"))
    assert_close("logits", found, logits(compress.load(artifact)), 0.01)
