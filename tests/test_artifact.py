"""The output folder: it loads as computed, with and without this package; it is whole or absent, and reproducible."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import compress
from compress import RTN, ArtifactError, Calibration, RecipeError
from compress.artifact import Artifact
from compress.driver import tokens_for
from compress.export.dense import export_dense
from compress.model.source import Checkpoint
from compress.model.travellers import batched, tokens_at_once
from compress.passes import PassManager
from compress.planning import plan_run
from compress.recipe import Recipe

INDEX = "model.safetensors.index.json"
RATIO = 1e-5  # float32: a decoded matrix gives the sums of its original up to their order
SITES = 14


@pytest.fixture(scope="session")
def artifact(family: str, model_folder: Any, recipe_24_int4: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family, pruned and quantized."""
    out = tmp_path_factory.mktemp(family) / "out"
    return compress.run(model_folder(family, sharded=True), recipe_24_int4, out).out


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.as_tensor(model(input_ids=ids, use_cache=False).logits)


# -- what loads is what was computed ---------------------------------------------------------------


@pytest.mark.slow
def test_the_loaded_model_is_the_compressed_one(
    family: str, artifact: Path, model_folder: Any, walk_of: Any, assert_close: Any, recipe_24_int4: Recipe
) -> None:
    walk = walk_of(model_folder(family))
    tokens = tokens_for(walk, model_folder(family), recipe_24_int4)
    with torch.inference_mode():
        probe = walk.enter(tokens.probe_NT)
        batches = [walk.enter(ids) for ids in batched(tokens.windows, tokens_at_once(walk.device))]
        list(PassManager(recipe_24_int4.passes).run(walk.visit(batches, probe)))
        want = walk.leave(probe)
    assert_close("logits", logits(compress.load(artifact), tokens.probe_NT), want, RATIO)


def test_transformers_loads_the_folder_by_itself(artifact: Path, hugging_face: Any, ids: Tensor) -> None:
    assert torch.equal(logits(hugging_face(artifact), ids), logits(compress.load(artifact), ids))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_models_load_too(
    dtype: str, model_folder: Any, tmp_path: Path, ids: Tensor, assert_close: Any, recipe_24_int4: Recipe
) -> None:
    folder = model_folder("qwen2", dtype)
    out = compress.run(folder, recipe_24_int4, tmp_path / "out").out
    dense = export_then_load(out, tmp_path / "dense")
    loaded = compress.load(out)
    assert loaded.dtype == getattr(torch, dtype)
    assert_close("logits", logits(loaded, ids), logits(dense, ids), 4 * torch.finfo(loaded.dtype).eps)


def export_then_load(artifact: Path, out: Path) -> Any:
    from transformers import AutoModelForCausalLM

    export_dense(artifact, out)
    return AutoModelForCausalLM.from_pretrained(out, local_files_only=True, dtype="auto").eval()


def test_low_memory_computes_the_same(artifact: Path, ids: Tensor, assert_close: Any) -> None:
    model = compress.load(artifact, low_memory=True)
    assert {m.lowered for m in model.modules() if type(m).__name__ == "CompressedLinear"} == {None}
    assert_close("logits", logits(model, ids), logits(compress.load(artifact), ids), RATIO)


def test_loading_leaves_nothing_uninitialised(artifact: Path) -> None:
    model = compress.load(artifact)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_the_model_generates(llama_artifact: Path, ids: Tensor) -> None:
    out = compress.load(llama_artifact).generate(ids[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, ids.shape[1] + 3)


def test_saving_a_loaded_model_writes_what_was_read(artifact: Path, tmp_path: Path, ids: Tensor) -> None:
    model = compress.load(artifact)
    model.save_pretrained(tmp_path / "again")
    read = {k: v for f in artifact.glob("*.safetensors") for k, v in load_file(f).items()}
    written = {k: v for f in (tmp_path / "again").glob("*.safetensors") for k, v in load_file(f).items()}
    assert written.keys() == read.keys()
    assert all(torch.equal(written[key], read[key]) for key in read)
    assert torch.equal(logits(compress.load(tmp_path / "again"), ids), logits(model, ids))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_tensors_keep_their_dtype_in_a_low_precision_model(
    dtype: str, model_folder: Any, tmp_path: Path, recipe_24_int4: Recipe
) -> None:
    out = compress.run(model_folder("llama", dtype), recipe_24_int4, tmp_path / "out").out
    stored = {k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()}
    compress.load(out).save_pretrained(tmp_path / "again")
    loaded = {k: v for f in (tmp_path / "again").glob("*.safetensors") for k, v in load_file(f).items()}
    assert {k: v.dtype for k, v in loaded.items()} == {k: v.dtype for k, v in stored.items()}
    assert all(torch.equal(loaded[key], stored[key]) for key in stored)


def test_code_of_a_model_finds_the_matrix_and_its_dtype(llama_artifact: Path) -> None:
    site = compress.load(llama_artifact).model.layers[0].mlp.up_proj
    assert torch.equal(site.weight, site.expression.dense())
    assert site.weight.dtype == site.dtype == torch.float32
    with pytest.raises(TypeError, match=r"a linear layer that computes in torch.float32 was given torch.uint8"):
        site(torch.ones(1, 48, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_loaded_model_may_be_cast(dtype: torch.dtype, llama_artifact: Path, ids: Tensor, assert_close: Any) -> None:
    model = compress.load(llama_artifact)
    want = logits(model, ids)
    got = logits(model.to(dtype), ids)
    assert got.dtype == dtype
    assert_close("logits", got, want, max(RATIO, 8 * torch.finfo(dtype).eps))  # a dozen roundings deep


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_dtype_asked_for_at_load_is_the_one_computed_in(
    dtype: str, llama_artifact: Path, ids: Tensor, assert_close: Any
) -> None:
    model = compress.load(llama_artifact, dtype=getattr(torch, dtype))
    got = logits(model, ids)
    assert got.dtype == getattr(torch, dtype)
    assert_close("logits", got, logits(compress.load(llama_artifact), ids), max(RATIO, 8 * torch.finfo(got.dtype).eps))


def test_casting_leaves_the_stored_tensors_alone(llama_artifact: Path) -> None:
    stored = {k: v for f in llama_artifact.glob("*.safetensors") for k, v in load_file(f).items()}
    cast = compress.load(llama_artifact).to(torch.bfloat16).state_dict()
    scales = [key for key in stored if key.endswith("_scale")]
    assert len(scales) == SITES
    assert all(torch.equal(cast[key.replace(".weight_", ".stored_")], stored[key]) for key in scales)


@pytest.fixture(scope="session")
def experts_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture of experts, every matrix of which is rounded."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("experts")
    sizes = {"vocab_size": 211, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    )
    model.save_pretrained(folder / "model")
    return compress.run(folder / "model", [RTN(bits=4, group=16)], folder / "out").out


@pytest.mark.parametrize("folder", ["llama_artifact", "experts_artifact"])
def test_stored_tensors_that_are_loaded_later_are_computed_with(
    folder: str, request: pytest.FixtureRequest, ids: Tensor, assert_close: Any
) -> None:
    prepared, lean = (compress.load(request.getfixturevalue(folder), low_memory=low) for low in (False, True))
    before = logits(prepared, ids)
    state = {key: t * 0.5 if key.endswith("scale") else t for key, t in prepared.state_dict().items()}
    for model in (prepared, lean):
        model.load_state_dict(state)
    assert not torch.allclose(logits(prepared, ids), before)
    assert_close("logits", logits(prepared, ids), logits(lean, ids), RATIO)


def test_experts_with_low_memory_may_be_called_while_they_compute(experts_artifact: Path, ids: Tensor) -> None:
    """As by another thread, that is done in the middle of the first call."""
    model = compress.load(experts_artifact, low_memory=True)
    want, others = logits(model, ids), iter([1])

    def meanwhile(*_: Any) -> None:
        if next(others, 0):
            logits(model, ids)

    model.model.layers[0].mlp.experts.act_fn.register_forward_pre_hook(meanwhile)
    assert torch.equal(logits(model, ids), want)


@pytest.mark.parametrize("low_memory", [True, False])
def test_experts_are_cast_with_their_model(low_memory: bool, experts_artifact: Path, ids: Tensor) -> None:
    options = {"low_memory": low_memory, "experts_implementation": "eager"}
    model = compress.load(experts_artifact, **options).to(torch.bfloat16)
    model.load_state_dict(model.state_dict())
    assert logits(model, ids).dtype == torch.bfloat16


def test_kept_weights_obey_the_pattern(artifact: Path) -> None:
    source = Artifact(artifact)
    kept = [source.expression(site).mask_OI.unflatten(1, (-1, 4)).sum(2).unique().tolist() for site in source.specs]
    assert kept == [[2]] * SITES


def test_biases_are_kept(model_folder: Any, tmp_path: Path, recipe_24_int4: Recipe) -> None:
    folder = model_folder("qwen2")
    out = compress.run(folder, recipe_24_int4, tmp_path / "out").out
    source, written = Checkpoint(folder), Artifact(out)
    biases = [name for name in source.names() if name.endswith(".bias")]
    loaded = compress.load(out).state_dict()
    assert len(biases) == 6
    assert all(torch.equal(written.tensor(name), source.tensor(name)) for name in biases)
    assert all(torch.equal(loaded[name], source.tensor(name)) for name in biases)


@pytest.mark.parametrize("family", ["llama_tied", "gemma"], indirect=True)
def test_tied_embeddings_are_stored_once(artifact: Path) -> None:
    assert "lm_head.weight" not in Checkpoint(artifact).names()
    model = compress.load(artifact)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# -- exports ---------------------------------------------------------------------------------------


def test_the_dense_export_denotes_the_same_model(
    artifact: Path, tmp_path: Path, ids: Tensor, assert_close: Any
) -> None:
    dense = export_then_load(artifact, tmp_path / "dense")
    assert type(dense.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear
    assert_close("logits", logits(dense, ids), logits(compress.load(artifact), ids), RATIO)


def test_the_dense_export_refuses_to_overwrite(llama_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    with pytest.raises(RecipeError, match="exists; choose another folder"):
        export_dense(llama_artifact, tmp_path / "dense")


def test_only_artifacts_are_exported(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a Compress artifact"):
        export_dense(tiny_llama, tmp_path / "dense")
    assert list(tmp_path.iterdir()) == []


# -- the folder ------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_two_runs_write_the_same_bytes(
    llama_artifact: Path, tiny_llama: Path, tmp_path: Path, recipe_24_int4: Recipe
) -> None:
    again = compress.run(tiny_llama, recipe_24_int4, tmp_path / "another name").out
    assert files(again) == files(llama_artifact)


def test_another_seed_writes_other_bytes(
    llama_artifact: Path, tiny_llama: Path, tmp_path: Path, recipe_24_int4: Recipe
) -> None:
    calibration = Calibration(samples=6, length=32, seed=1)
    other = compress.run(tiny_llama, recipe_24_int4, tmp_path / "out", calibration=calibration).out
    shards = [name for name in files(other) if name.endswith(".safetensors")]
    assert any(files(other)[name] != files(llama_artifact)[name] for name in shards)


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_umask")
def test_everybody_may_read_the_files(tiny_llama: Path, tmp_path: Path) -> None:
    out = compress.run(tiny_llama, [RTN(group=8)], tmp_path / "out").out
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o644}
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


def test_the_folder_has_the_parts_of_a_hugging_face_model(llama_artifact: Path) -> None:
    names = set(files(llama_artifact))
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert names == shards | {INDEX, "config.json", "compress.json", "README.md", "ledger.svg",
                              "generation_config.json", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip


def test_sites_that_stay_count_as_their_file_holds_them(tiny_llama: Path, tmp_path: Path) -> None:
    """Also where the config names a smaller dtype than that of the file, whose tensors are copied as they are."""
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    report = compress.run(folder, [RTN(group=8, sites="*mlp*")], tmp_path / "out")
    entries = {name: math.prod(held.shape) for name, held in Checkpoint(folder).headers.items() if "_proj" in name}
    copied = sum(4 * count for name, count in entries.items() if "self_attn" in name)
    rounded = sum(row["bytes"] for row in Artifact(report.out).provenance["sites"].values())
    assert report.bits_per_weight == pytest.approx(8 * (copied + rounded) / sum(entries.values()))
    planned = plan_run(folder, Recipe(passes=(RTN(group=8, sites="*mlp*"),)))
    assert planned.bits_per_weight == pytest.approx(report.bits_per_weight)


def test_the_report_is_what_the_folder_holds(tiny_llama: Path, tmp_path: Path, recipe_24_int4: Recipe) -> None:
    report = compress.run(tiny_llama, recipe_24_int4, tmp_path / "out")
    tensors = [t for path in report.out.glob("*.safetensors") for t in load_file(path).values()]
    sites = Artifact(report.out).provenance["sites"]
    assert report.artifact_bytes == sum(t.nbytes for t in tensors)
    assert report.source_bytes == sum(t.nbytes for t in load_file(tiny_llama / "model.safetensors").values())
    assert report.bits_per_weight == 8 * sum(row["bytes"] for row in sites.values()) / sum(
        report.coverage.touched.values()
    )
    assert report.kl > 0


def test_what_no_pass_touched_is_the_source_bit_for_bit(llama_artifact: Path, tiny_llama: Path) -> None:
    source, written = Checkpoint(tiny_llama), Artifact(llama_artifact)
    untouched = [name for name in source.names() if "proj" not in name]
    assert len(untouched) == 7
    assert all(torch.equal(written.tensor(name), source.tensor(name)) for name in untouched)


def test_provenance_records_how_it_was_made(llama_artifact: Path, recipe_24_int4: Recipe) -> None:
    provenance = Artifact(llama_artifact).provenance
    row = provenance["sites"]["model.layers.1.mlp.down_proj"]
    assert provenance["recipe"] == replace(recipe_24_int4, model=provenance["source"]["name"]).to_yaml()
    assert provenance["calibration"]["tokens"] == row["tokens"] == 6 * 32
    assert row["weight"] == "2:4·int4g8"
    assert 0 < row["output_error"] < row["weight_error"] < 1
    assert row["damping"] == 0.01
    assert provenance["source"]["family"] == "llama"


def test_nothing_in_the_folder_tells_where_it_was_made(llama_artifact: Path) -> None:
    texts = [content.decode() for name, content in files(llama_artifact).items() if name.endswith((".json", ".md"))]
    assert not any("/tmp" in text or str(llama_artifact.parent) in text for text in texts)
