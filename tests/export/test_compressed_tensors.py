"""compressed-tensors: stock transformers loads the exported folder and computes what the artifact computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import GPTQ, RTN, Magnitude, UnsupportedWeight, VerificationError
from compress.artifact import Artifact
from compress.export import export
from compress.foreign import CompressedTensors
from compress.model.source import Checkpoint
from compress.passes import FP8, HQQ, MXFP4, NF4, NVFP4, Int8

pytest.importorskip("compressed_tensors")
CT = "compressed-tensors"
BF16 = 2.0**-8  # of a value: half a step of bfloat16
FORMATS = {
    "int4-group": ([RTN(bits=4, group=32, symmetric=True)], "pack-quantized"),
    "int4-row": ([RTN(bits=4, group=0, symmetric=True)], "pack-quantized"),
    "int2-group": ([RTN(bits=2, group=16, symmetric=True)], "pack-quantized"),
    "int8-tensor": ([RTN(bits=8, group=-1, symmetric=True)], "pack-quantized"),
    "pruned": ([Magnitude(sparsity="2:4"), RTN(bits=4, group=32, symmetric=True)], "pack-quantized"),
    "mixed": (
        [RTN(bits=4, group=32, symmetric=True, sites="*mlp*"), RTN(bits=8, group=0, symmetric=True, sites="*attn*")],
        "pack-quantized",
    ),
    "some-plain": ([RTN(bits=4, group=32, symmetric=True, sites="*mlp*"), Magnitude(sites="*attn*")], "pack-quantized"),
}


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_integers_load_in_stock_transformers_as_they_are(
    kind: str, artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    passes, form = FORMATS[kind]
    artifact = artifact_of(passes)
    done = export(artifact, CT, tmp_path / "out")
    assert config_of(done.out)["format"] == form
    assert done.rounding == 0.0
    assert_close("logits", logits(stock(done.out)), logits(compress.load(artifact)), 1e-6)


@pytest.mark.parametrize("tile", ["row", "tensor", "32x64"])
def test_8_bit_floats_load_in_stock_transformers_as_they_are(
    tile: str, leaves: Any, artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    artifact = artifact_of([leaves(kind="fp8-block") if tile == "32x64" else FP8(tile=tile)])
    done = export(artifact, CT, tmp_path / "out")
    assert done.rounding == 0.0
    assert_close("logits", logits(stock(done.out)), logits(compress.load(artifact)), 1e-6)


@pytest.mark.parametrize("step", [NVFP4(), MXFP4()], ids=str)
def test_4_bit_floats_load_in_a_model_of_bfloat16(
    step: Any, small: Any, artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    artifact = artifact_of([step], small(dtype="bfloat16"))
    done = export(artifact, CT, tmp_path / "out")
    assert done.rounding < BF16  # the scale of the matrix is stored as its inverse: a tie of bfloat16 may go either way
    assert_close("logits", logits(stock(done.out)), logits(compress.load(artifact)), 4 * BF16)
    assert "run it in bfloat16" in done.note


@pytest.mark.parametrize("kind", [Int8, FP8])
def test_rounded_inputs_are_said(
    kind: Any, artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    """The library's step is 1/127.5 of a token's largest entry, ours 1/127: two roundings of the same inputs.

    Each is as far from the unrounded inputs as the other, so they are at most twice as far from each other.
    """
    inputs = "int8" if kind is Int8 else "fp8"
    full, rounded = (logits(compress.load(artifact_of([kind(inputs=given)]))) for given in ("full", inputs))
    out = export(artifact_of([kind(inputs=inputs)]), CT, tmp_path / "out").out
    group = config_of(out)["config_groups"]["group_0"]
    assert (group["input_activations"]["dynamic"], group["input_activations"]["strategy"]) == (True, "token")
    assert group["format"] == ("int-quantized" if inputs == "int8" else "float-quantized")
    loss = float((rounded - full).norm() / full.norm())
    assert 1e-3 < loss < 0.2
    assert_close("logits", logits(stock(out)), rounded, 2 * loss)


def test_gptqs_own_integers_are_stored(artifact_of: Any, tmp_path: Path) -> None:
    """Decoded by the format's definition: eight 4-bit values a word, lowest first, zero at 8."""
    artifact = artifact_of([GPTQ(bits=4, group=32, symmetric=True)])
    stored, site = Checkpoint(export(artifact, CT, tmp_path / "out").out), "model.layers.1.mlp.down_proj"
    words = stored.tensor(f"{site}.weight_packed").long() & 0xFFFFFFFF
    codes = torch.stack([(words >> 4 * i) & 15 for i in range(8)], -1).flatten(1) - 8
    scale = stored.tensor(f"{site}.weight_scale").float().repeat_interleave(32, 1)
    assert torch.equal(codes * scale, Artifact(artifact).expression(site).dense())


def test_pruned_weights_stay_zero(artifact_of: Any, tmp_path: Path, stock: Any, logits: Any) -> None:
    artifact = artifact_of(FORMATS["pruned"][0])
    done = export(artifact, CT, tmp_path / "out")
    model = stock(done.out)
    logits(model)  # the library decodes at the first forward pass
    mask = Artifact(artifact).expression("model.layers.0.mlp.up_proj").mask_OI  # type: ignore[attr-defined]
    weight = model.model.layers[0].mlp.up_proj.weight
    assert bool((weight[~mask] == 0).all()) and int(mask.sum()) == mask.numel() // 2
    assert "the mask is lost" in done.note


def test_every_site_has_the_scheme_of_its_own(artifact_of: Any, tmp_path: Path) -> None:
    out = export(artifact_of(FORMATS["mixed"][0]), CT, tmp_path / "out").out
    groups = config_of(out)["config_groups"].values()
    widths = {group["weights"]["num_bits"]: sorted({t.split(".")[3] for t in group["targets"]}) for group in groups}
    assert widths == {4: ["mlp"], 8: ["self_attn"]}
    assert config_of(out)["ignore"] == ["lm_head", "model.embed_tokens"]


def test_biases_and_tied_embeddings_load(
    small: Any, artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    artifact = artifact_of(FORMATS["int4-group"][0], small("qwen2", tie_word_embeddings=True))
    out = export(artifact, CT, tmp_path / "out").out
    assert_close("logits", logits(stock(out)), logits(compress.load(artifact)), 1e-6)


def test_a_file_without_the_models_prefix_is_targeted(
    bare_bloom: Path, artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    artifact = artifact_of(FORMATS["int4-group"][0], bare_bloom)
    out = export(artifact, CT, tmp_path / "out").out
    assert all(name.startswith("transformer.h.") for name in config_of(out)["config_groups"]["group_0"]["targets"])
    assert_close("logits", logits(stock(out)), logits(compress.load(artifact)), 1e-6)


def test_a_vision_language_model_is_targeted_by_its_modules(
    llava: Path, artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    artifact = artifact_of(FORMATS["some-plain"][0], llava)
    out = export(artifact, CT, tmp_path / "out").out
    config = config_of(out)
    assert all(t.startswith("model.language_model.layers.") for t in config["config_groups"]["group_0"]["targets"])
    assert "model.language_model.layers.0.self_attn.q_proj" in config["ignore"]
    model = stock(out, auto="AutoModelForImageTextToText")
    assert_close("logits", logits(model), logits(compress.load(artifact)), 1e-6)


@pytest.mark.parametrize(
    ("prefix", "match"),
    [
        ("model.", r"gives the module transformer.h.0.self_attention.query_key_value its scheme"),
        ("transformer.", r"transformer.word_embeddings: is stored dense, but a target"),
    ],
)
def test_a_config_that_loaders_would_misread_is_not_put_in_place(
    prefix: str, match: str, bare_bloom: Path, artifact_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaders leave a module that they find no target for, or no packed weight, at random values without a word."""
    artifact = artifact_of(FORMATS["int4-group"][0], bare_bloom)
    named = [f"{prefix}{name}" for name in (*Artifact(artifact).specs, "word_embeddings")]
    monkeypatch.setattr("compress.export.compressed_tensors.CompressedTensors.targets", lambda *_: named)
    monkeypatch.setattr("compress.export.compressed_tensors.CompressedTensors.plain", lambda _: ["lm_head"])
    with pytest.raises(VerificationError, match=match):
        export(artifact, CT, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_experts_of_a_mixture_load_by_their_names(
    small: Any, artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    model = small("mixtral", num_local_experts=4, num_experts_per_tok=2)
    artifact = artifact_of([RTN(bits=4, group=32, symmetric=True)], model)
    out = export(artifact, CT, tmp_path / "out").out
    assert r"re:.*\.experts\..*" in config_of(out)["config_groups"]["group_0"]["targets"]
    assert_close("logits", logits(stock(out)), logits(compress.load(artifact)), 1e-6)


@pytest.mark.slow
def test_what_a_bfloat16_model_loses_is_told(
    tmp_path: Path, stock: Any, logits: Any, assert_close: Any, artifact_of: Any
) -> None:
    """The built-in model: its scales are rounded to bfloat16 when loaded, and to nothing in float32."""
    artifact = artifact_of([RTN(bits=4, group=64, symmetric=True)], Path("builtin"))
    done = export(artifact, CT, tmp_path / "out")
    assert 0 < done.rounding < BF16
    assert_close("logits", logits(stock(done.out)), logits(compress.load(artifact)), 0.02)
    assert_close(
        "logits", logits(stock(done.out, torch.float32)), logits(compress.load(artifact, dtype=torch.float32)), 1e-6
    )
    assert done.bytes < 0.46 * Artifact(artifact).provenance["sizes"]["source_bytes"]


REFUSED: dict[str, tuple[Any, str]] = {
    "3 bits": (RTN(bits=3, group=32, symmetric=True), "use bits: 2, 4 or 8"),
    "zeros": (RTN(bits=4, group=32), "use symmetric: true, --to gptq"),
    "real zeros": (HQQ(bits=4, group=32), "use symmetric: true"),
    "grouped W8A8": (RTN(bits=8, group=32, symmetric=True, inputs="int8"), "use bits: 8, group: 0"),
    "int with fp8": (Int8(inputs="fp8"), "use inputs: int8"),
    "fp8 with int8": (FP8(inputs="int8"), "use inputs: fp8"),
    "fp4 with int8": (NVFP4(inputs="int8"), "use inputs: full"),
    "e5m2": (FP8(format="e5m2"), "use e4m3"),
    "nf4": (NF4(), "use --to dense"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_say_is_refused_by_name(case: str, small: Any, artifact_of: Any, tmp_path: Path) -> None:
    step, match = REFUSED[case]
    artifact = artifact_of([step], small(dtype="bfloat16"))
    with pytest.raises(UnsupportedWeight, match=match):
        export(artifact, CT, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "match"),
    [("lowrank", r"model.layers.0.self_attn.q_proj \(r8\)"), ("fp8-group", "no strategy has tiles of 1x32")],
)
def test_leaves_without_a_format_are_refused(
    kind: str, match: str, leaves: Any, artifact_of: Any, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedWeight, match=match):
        export(artifact_of([leaves(kind=kind)]), CT, tmp_path / "out")


def test_4_bit_floats_in_a_model_of_float32_are_refused(artifact_of: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedWeight, match="cannot run it in a model of another dtype"):
        export(artifact_of([NVFP4()]), CT, tmp_path / "out")


@pytest.mark.slow
def test_experts_of_two_kinds_are_refused(small: Any, artifact_of: Any, tmp_path: Path) -> None:
    model = small("mixtral", num_local_experts=4, num_experts_per_tok=2)
    only = [
        RTN(bits=4, group=32, symmetric=True, sites="*.experts.0.*"),
        RTN(bits=8, group=32, symmetric=True, sites="*.experts.[1-9].*"),
    ]
    with pytest.raises(UnsupportedWeight, match="one scheme for all experts"):
        export(artifact_of(only, model), CT, tmp_path / "out")


def test_the_matrices_are_those_of_the_artifact(artifact_of: Any, tmp_path: Path) -> None:
    artifact = artifact_of(FORMATS["int4-group"][0])
    read, meant = CompressedTensors(export(artifact, CT, tmp_path / "out").out), Artifact(artifact)
    assert read.names() == meant.names()
    assert all(torch.equal(read.tensor(name), meant.tensor(name)) for name in meant.names())
