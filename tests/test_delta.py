"""A delta: the difference of a fine-tuned model from its base, compressed, pinned, applied and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import (
    GPTQ,
    RTN,
    SVDLLM,
    ArtifactError,
    Calibration,
    Delta,
    FineTune,
    Global,
    Magnitude,
    Realign,
    Recipe,
    RecipeError,
    Sensitivity,
    SmoothQuant,
    SparseGPT,
    VerificationError,
)
from compress.artifact import Artifact, fingerprint, verify
from compress.codecs import recipes_of
from compress.events import RunFinished
from compress.export.dense import export_dense
from compress.model.source import Checkpoint
from compress.passes import DARE, BitDelta
from compress.sources import open_source
from compress.weights import External, Masked, Signs, Sum

Run = Callable[..., tuple[int, str, str]]
FEW = Calibration(samples=6, length=32)


def tuned(base: Path, out: Path, tables: bool = False, grow: int = 0, only: str = "") -> Path:
    """A copy of a model that was 'fine-tuned': blocks and final norm moved, by a little; `only` modules named so."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype="auto")
    if grow:
        model.resize_token_embeddings(model.config.vocab_size + grow, mean_resizing=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            moved = tables or not ("embed" in name or "lm_head" in name)
            step = torch.randn(parameter.shape, generator=generator) * 0.02
            if moved and only in name:
                parameter.add_(step.to(parameter.dtype))
    model.save_pretrained(out)
    for file in base.iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copy(file, out / file.name)
    return out


@pytest.fixture(scope="module")
def finetuned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(tiny_llama, tmp_path_factory.mktemp("tuned") / "tuned")


@pytest.fixture(scope="module")
def zipped(tiny_llama: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeltaZip: 2:4 with error feedback, then four bits."""
    recipe = Recipe(
        passes=(SparseGPT(sparsity="2:4"), GPTQ(group=8)), calibration=FEW, delta=Delta(base=str(tiny_llama))
    )
    return compress.run(finetuned, recipe, tmp_path_factory.mktemp("delta") / "zipped").out


def delta_of(
    model: Path, base: Path, out: Path, *passes: Any, calibration: Calibration = FEW, **options: Any
) -> compress.job.Report:  # type: ignore[name-defined]
    steps = passes or (RTN(bits=4, group=0),)
    recipe = Recipe(passes=steps, calibration=calibration, delta=Delta(base=str(base), **options))
    return compress.run(model, recipe, out)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids, use_cache=False).logits)


# -- what is stored --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_delta_is_expressions_on_its_base(zipped: Path, tiny_llama: Path, finetuned: Path) -> None:
    delta, base, own = Artifact(zipped, tiny_llama), Checkpoint(tiny_llama), Checkpoint(finetuned)
    for site in delta.specs:
        match delta.expression(site):
            case Sum((External(w_OI), Masked() as difference)):
                assert torch.equal(w_OI, base.tensor(f"{site}.weight"))
                assert torch.equal(difference.dense(), delta.difference(site).dense())
            case other:
                pytest.fail(f"{site} is {other.describe()}")
        change = own.tensor(f"{site}.weight") - base.tensor(f"{site}.weight")
        assert (delta.difference(site).dense() - change).norm() < change.norm()
        assert (delta.tensor(f"{site}.weight") - own.tensor(f"{site}.weight")).norm() < change.norm()


def test_what_no_pass_rewrites_is_exact_and_stored_only_where_it_differs(
    zipped: Path, tiny_llama: Path, finetuned: Path
) -> None:
    delta, own = Artifact(zipped, tiny_llama), Checkpoint(finetuned)
    assert delta.names() == own.names()
    assert {name.split(".")[-2] for name in delta.changed()} == {"input_layernorm", "post_attention_layernorm", "norm"}
    sites = {f"{site}.weight" for site in delta.specs}
    assert all(torch.equal(delta.tensor(name), own.tensor(name)) for name in own.names() if name not in sites)


def test_the_folder_is_as_small_as_it_says(zipped: Path, finetuned: Path) -> None:
    held = Artifact(zipped)
    on_disk = sum(file.stat().st_size for file in zipped.glob("*.safetensors"))
    assert held.provenance["sizes"]["bytes"] < on_disk < held.provenance["sizes"]["bytes"] + 40_000  # headers
    assert not (zipped / "tokenizer.json").exists()  # the base has it
    assert held.provenance["base"]["sha256"] == held.pin["sha256"] if held.pin else False


def test_a_matrix_that_fine_tuning_left_alone_costs_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    partly = tuned(tiny_llama, tmp_path / "partly", only="mlp")
    report = delta_of(partly, tiny_llama, tmp_path / "d")
    delta = Artifact(report.out, tiny_llama)
    assert delta.specs and all(".mlp." in site for site in delta.specs)
    assert delta.changed() == []
    assert delta.names() == Checkpoint(partly).names()


def test_nothing_to_store_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    same = shutil.copytree(tiny_llama, tmp_path / "same")
    with pytest.raises(RecipeError, match="does not differ from"):
        delta_of(same, tiny_llama, tmp_path / "d")
    assert not (tmp_path / "d").exists()


# -- every pass works on differences ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "passes",
    [
        (Magnitude(sparsity=0.9, scope="matrix"),),
        (SVDLLM(removed=0.8), GPTQ(bits=8, group=0, factors=True)),
        (Magnitude(sparsity=0.5), FineTune(steps=4, held_out=2, batch=2)),
        (Sensitivity(), RTN(bits=4, group=0)),
        (BitDelta(levels=2), FineTune(steps=4, held_out=2, batch=2)),
        (Magnitude(sparsity=0.8), BitDelta(fit="mean")),
        (DARE(density=0.9), RTN(bits=8, group=0)),
        (DARE(density=0.7, keep="importance"),),
    ],
)
def test_a_pass_rewrites_the_difference_alone(
    tiny_llama: Path, finetuned: Path, tmp_path: Path, passes: tuple[Any, ...]
) -> None:
    report = delta_of(finetuned, tiny_llama, tmp_path / "d", *passes)
    delta, base, own = Artifact(report.out, tiny_llama), Checkpoint(tiny_llama), Checkpoint(finetuned)
    for site in delta.specs:
        change = own.tensor(f"{site}.weight") - base.tensor(f"{site}.weight")
        assert (delta.difference(site).dense() - change).norm() < change.norm()


def test_its_errors_are_those_of_the_difference(tiny_llama: Path, finetuned: Path, tmp_path: Path) -> None:
    report = delta_of(finetuned, tiny_llama, tmp_path / "d", Magnitude(sparsity=0.9))
    rows = Artifact(report.out).provenance["sites"]
    assert all(0.5 < row["weight_error"] < 1 for row in rows.values())  # of the whole matrix it is near 0.1


@pytest.mark.slow
def test_the_finer_the_nearer_to_the_fine_tuned_model(
    tiny_llama: Path, finetuned: Path, tmp_path: Path, hugging_face: Any, ids: Tensor
) -> None:
    kl = [delta_of(finetuned, tiny_llama, tmp_path / f"{b}", RTN(bits=b, group=0)).kl for b in (2, 4, 8)]
    assert kl[0] > kl[1] > kl[2]
    near = logits(compress.load(tmp_path / "8", base=tiny_llama), ids)
    wanted = logits(hugging_face(finetuned), ids)
    assert (near - wanted).norm() < 1e-2 * (wanted - logits(hugging_face(tiny_llama), ids)).norm()


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ((Realign(), RTN()), "realign: cannot be applied to the difference"),
        ((SmoothQuant(), RTN()), "smoothquant: cannot be applied to the difference"),
        ((RTN(inputs="int8"),), "the base reads the same input"),
    ],
)
def test_what_means_nothing_for_a_difference_is_refused(passes: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(passes=passes, delta=Delta(base="builtin"))


# -- applying, loading, verifying ------------------------------------------------------------------


def test_applied_and_loaded_are_one_model(zipped: Path, tiny_llama: Path, tmp_path: Path, ids: Tensor) -> None:
    export_dense(zipped, tmp_path / "applied", tiny_llama)
    assert (tmp_path / "applied" / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
    applied = compress.load(tmp_path / "applied")
    assert torch.equal(logits(applied, ids), logits(compress.load(zipped, base=tiny_llama), ids))


def test_the_wrong_base_is_refused(zipped: Path, finetuned: Path, tmp_path: Path) -> None:
    for attempt in (
        lambda: compress.load(zipped, base=finetuned),
        lambda: export_dense(zipped, tmp_path / "x", finetuned),
        lambda: verify(zipped, finetuned),
    ):
        with pytest.raises(ArtifactError, match="is not the base of"):
            attempt()
    assert not (tmp_path / "x").exists()


def test_a_base_is_known_by_its_tensors_not_its_files(zipped: Path, tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, local_files_only=True, dtype="auto")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert fingerprint(Checkpoint(tmp_path / "sharded")) == fingerprint(Checkpoint(tiny_llama))
    assert len(verify(zipped, tmp_path / "sharded")) == 3


def test_a_base_with_one_other_bit_is_another(tiny_llama: Path, zipped: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    file = other / "model.safetensors"
    held = bytearray(file.read_bytes())
    held[-1] ^= 1
    file.write_bytes(held)
    with pytest.raises(ArtifactError, match="is not the base of"):
        Artifact(zipped, other)


def test_without_its_base_it_is_nothing(zipped: Path, hugging_face: Any) -> None:
    with pytest.raises(ArtifactError, match="is a delta of"):
        compress.load(zipped)
    with pytest.raises(ArtifactError, match="compress delta apply"):
        open_source(zipped, dequantize=True)
    with pytest.raises(ArtifactError, match="give its base"):
        hugging_face(zipped)
    assert "not checked against" in verify(zipped)[-1]


def test_a_changed_byte_is_found(zipped: Path, tiny_llama: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(zipped, tmp_path / "damaged"))
    shard = max(damaged.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    held = bytearray(shard.read_bytes())
    held[-5] ^= 4
    shard.write_bytes(held)
    with pytest.raises(VerificationError, match="sha256"):
        export_dense(damaged, tmp_path / "x", tiny_llama)


def test_a_whole_model_takes_no_base(llama_artifact: Path, tiny_llama: Path) -> None:
    with pytest.raises(ArtifactError, match="not a delta"):
        compress.load(llama_artifact, base=tiny_llama)


# -- tables, norms and vocabularies ----------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tables(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(tiny_llama, tmp_path_factory.mktemp("tables") / "tables", tables=True)


def test_tables_are_kept_exactly_by_default(with_tables: Path, tiny_llama: Path, tmp_path: Path) -> None:
    delta = Artifact(delta_of(with_tables, tiny_llama, tmp_path / "d").out, tiny_llama)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(delta.tensor(name), Checkpoint(with_tables).tensor(name))


@pytest.mark.slow
def test_a_table_in_eight_bits_is_near_and_smaller(with_tables: Path, tiny_llama: Path, tmp_path: Path) -> None:
    whole = delta_of(with_tables, tiny_llama, tmp_path / "own")
    small = delta_of(with_tables, tiny_llama, tmp_path / "int8", embeddings="int8", head="int8")
    delta, own, base = Artifact(small.out, tiny_llama), Checkpoint(with_tables), Checkpoint(tiny_llama)
    name = "model.embed_tokens.weight"
    change = own.tensor(name) - base.tensor(name)
    assert (delta.tensor(name) - own.tensor(name)).norm() < 0.01 * change.norm()
    assert delta.provenance["sites"]["model.embed_tokens"]["weight_error"] < 0.01
    assert whole.artifact_bytes - small.artifact_bytes > 2 * own.tensor(name).numel()  # of float32 tables


@pytest.mark.slow
def test_the_base_of_a_table_costs_nothing_and_counts_as_lost(
    with_tables: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    kept = delta_of(with_tables, tiny_llama, tmp_path / "own", RTN(bits=8, group=0))
    lost = delta_of(
        with_tables, tiny_llama, tmp_path / "base", RTN(bits=8, group=0), embeddings="base", head="base", others="base"
    )
    delta = Artifact(lost.out, tiny_llama)
    assert delta.changed() == []
    assert all(
        torch.equal(delta.tensor(n), Checkpoint(tiny_llama).tensor(n)) for n in ("lm_head.weight", "model.norm.weight")
    )
    assert lost.kl > 10 * kept.kl > 0


def test_a_tied_table_follows_the_embeddings(model_folder: Any, tmp_path: Path, ids: Tensor) -> None:
    base = model_folder("llama_tied")
    moved = tuned(base, tmp_path / "tied", tables=True)
    report = delta_of(moved, base, tmp_path / "d", embeddings="int8")
    loaded = compress.load(report.out, base=base)
    assert "model.embed_tokens" in Artifact(report.out).specs
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.slow
def test_a_grown_vocabulary_is_kept_or_refused(
    tiny_llama: Path, tmp_path: Path, ids: Tensor, hugging_face: Any
) -> None:
    grown = tuned(tiny_llama, tmp_path / "grown", tables=True, grow=5)
    for embeddings in ("own", "int8"):
        report = delta_of(
            grown, tiny_llama, tmp_path / embeddings, RTN(bits=8, group=0), embeddings=embeddings, head=embeddings
        )
        got, wanted = logits(compress.load(report.out, base=tiny_llama), ids), logits(hugging_face(grown), ids)
        assert got.shape == wanted.shape
        assert (got - wanted).norm() < 0.02 * wanted.norm()
    with pytest.raises(RecipeError, match="the option is refuse"):
        delta_of(grown, tiny_llama, tmp_path / "x", vocabulary="refuse")
    with pytest.raises(RecipeError, match=r"delta.embeddings.*it must be own"):
        delta_of(grown, tiny_llama, tmp_path / "x", embeddings="base")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("family", "sites"), [("gpt2", 8), ("mixtral", 0)])
def test_other_layouts(family: str, sites: int, tmp_path: Path, ids: Tensor, hugging_face: Any) -> None:
    """Matrices kept as [in, out], and experts stored one by one of which the model makes a stack."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 211},
        "mixtral": {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "num_local_experts": 3, "vocab_size": 211},
    }  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes[family])).save_pretrained(tmp_path / "base")
    moved = tuned(tmp_path / "base", tmp_path / "moved")
    report = delta_of(moved, tmp_path / "base", tmp_path / "d", RTN(bits=8, group=0))
    delta = Artifact(report.out, tmp_path / "base")
    assert delta.specs and (not sites or len(delta.specs) == sites)
    got, wanted = logits(compress.load(report.out, base=tmp_path / "base"), ids), logits(hugging_face(moved), ids)
    assert (got - wanted).norm() < 0.02 * (wanted - logits(hugging_face(tmp_path / "base"), ids)).norm()


# -- experts ---------------------------------------------------------------------------------------

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "gpt_oss": {
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "head_dim": 12,
        "layer_types": ["full_attention"] * 2,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("family", list(MIXTURES))  # a tensor for each expert, and one for all of them
@pytest.mark.parametrize("sites", ["*", "*experts*0"])
def test_experts_that_were_not_rewritten_are_exact(
    family: str, sites: str, tmp_path: Path, ids: Tensor, hugging_face: Any
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 211, "pad_token_id": 3}  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **MIXTURES[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    moved = tuned(tmp_path / "base", tmp_path / "moved", only="layers.1.mlp")
    step = RTN(bits=8, group=0) if sites == "*" else RTN(bits=8, group=0, sites="*layers.1*experts*0*")
    report = delta_of(moved, tmp_path / "base", tmp_path / "d", step)
    delta, own = Artifact(report.out, tmp_path / "base"), Checkpoint(moved)
    assert len(verify(report.out, tmp_path / "base")) == 3
    export_dense(report.out, tmp_path / "applied", tmp_path / "base")
    rewritten = {name for name, row in delta.provenance["sites"].items() if row["weight_error"]}
    touched = {delta.specs[site].get("tensor", f"{site}.weight") for site in rewritten}
    assert touched and all("layers.1" in name for name in touched)
    for name in set(own.names()) - touched:
        assert torch.equal(delta.tensor(name), own.tensor(name)), name
    got, wanted = logits(compress.load(report.out, base=tmp_path / "base"), ids), logits(hugging_face(moved), ids)
    assert (got - wanted).norm() < 0.02 * (wanted - logits(hugging_face(tmp_path / "base"), ids)).norm()


# -- dtypes and what else differs --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_a_base_of_another_dtype_is_read_in_that_of_the_fine_tune(
    before: str, after: str, model_folder: Any, tmp_path: Path, ids: Tensor, hugging_face: Any
) -> None:
    from transformers import AutoModelForCausalLM

    base = model_folder("llama", before)
    cast = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype=getattr(torch, after))
    cast.save_pretrained(tmp_path / "cast")
    for file in base.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "cast" / file.name)
    moved = tuned(tmp_path / "cast", tmp_path / "moved", only="layers.1.mlp")
    report = delta_of(moved, base, tmp_path / "d", RTN(bits=8, group=0), others="base")
    delta, own = Artifact(report.out, base), Checkpoint(moved)
    assert delta.changed() == [] and all(".1.mlp." in site for site in delta.specs)
    assert delta.headers == own.headers
    for site, row in delta.provenance["sites"].items():
        change = own.tensor(f"{site}.weight").float() - cast.state_dict()[f"{site}.weight"].float()
        error = (delta.tensor(f"{site}.weight").float() - own.tensor(f"{site}.weight").float()).norm() / change.norm()
        assert error < 2 * row["weight_error"] + 2**-8 * 10  # and the rounding of the sum to a matrix ten times larger
    assert export_dense(report.out, tmp_path / "applied", base).bytes == own.nbytes()


def test_what_only_norms_learned_is_a_delta_too(tiny_llama: Path, tmp_path: Path) -> None:
    moved = tuned(tiny_llama, tmp_path / "moved", only="norm")
    delta = Artifact(delta_of(moved, tiny_llama, tmp_path / "d").out, tiny_llama)
    assert delta.specs == {} and len(delta.changed()) == 5
    assert all(torch.equal(delta.tensor(n), Checkpoint(moved).tensor(n)) for n in delta.names())
    assert compress.load(tmp_path / "d", base=tiny_llama) is not None


def test_a_budget_does_not_count_what_did_not_change(tiny_llama: Path, tmp_path: Path) -> None:
    moved = tuned(tiny_llama, tmp_path / "moved", only="layers.1.mlp")
    report = delta_of(moved, tiny_llama, tmp_path / "d", Global(), Magnitude(sparsity=0.5))
    kept = [row["mask"]["kept"] for row in Artifact(report.out).provenance["sites"].values()]
    assert sum(kept) / len(kept) == pytest.approx(0.5, abs=0.02)


def test_options_of_a_recipe_stand_unless_they_are_given(
    cli: Run, with_tables: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("passes: [{rtn: {bits: 4, group: 0}}]\ndelta: {base: builtin, embeddings: int8, head: base}\n")
    asked = ("--base", tiny_llama, "--recipe", recipe, "--head", "int8", "--out", tmp_path / "d")
    assert cli("delta", "extract", with_tables, *asked)[0] == 0
    assert {"model.embed_tokens", "lm_head"} <= Artifact(tmp_path / "d").specs.keys()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration of a few windows where nobody says otherwise."""
    monkeypatch.setattr("compress.extraction.Calibration", lambda: FEW)


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_more_bits_than_twice_fit_are_not_asked_for(cli: Run, model_folder: Any, tmp_path: Path) -> None:
    base = model_folder("short")
    asked = ("--base", base, "--method", "auto", "--bits", "9", "--out", tmp_path / "d", "--json")
    code, printed, said = cli("delta", "extract", tuned(base, tmp_path / "tuned"), *asked)
    assert code == 0, said
    assert json.loads(printed)["bits_per_weight"] <= 9


# -- refusals and the command line -----------------------------------------------------------------


def test_another_architecture_is_refused(tiny_llama: Path, model_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a qwen2, its base"):
        delta_of(model_folder("qwen2"), tiny_llama, tmp_path / "d")
    with pytest.raises(RecipeError, match="is the model itself"):
        delta_of(tiny_llama, tiny_llama, tmp_path / "d")
    with pytest.raises(ArtifactError, match="no model folder"):
        delta_of(tiny_llama, tmp_path / "nowhere", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_base_that_is_not_finite_is_refused(tiny_llama: Path, finetuned: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    state = load_file(broken / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"up_proj.weight holds NaN"):
        delta_of(finetuned, broken, tmp_path / "d")


@pytest.mark.parametrize(
    ("pin", "message"), [("x", "base"), ({"name": 3}, "base"), ({"name": "n", "sha256": "0"}, "is not the base")]
)
def test_a_hostile_pin_is_refused(zipped: Path, tiny_llama: Path, tmp_path: Path, pin: Any, message: str) -> None:
    hostile = Path(shutil.copytree(zipped, tmp_path / "hostile"))
    config = json.loads((hostile / "config.json").read_text())
    config["quantization_config"]["base"] = pin
    (hostile / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message):
        compress.load(hostile, base=tiny_llama)


@pytest.mark.slow
def test_the_command_line(cli: Run, tiny_llama: Path, finetuned: Path, tmp_path: Path) -> None:
    out, applied = tmp_path / "d", tmp_path / "applied"
    recipe = tmp_path / "r.yaml"
    recipe.write_text("passes: [{rtn: {bits: 4, group: 0}}]\n")
    code, printed, _ = cli(
        "delta", "extract", finetuned, "--base", tiny_llama, "--recipe", recipe, "--out", out, "--json"
    )
    assert code == 0
    assert json.loads(printed)["share"] < 0.5
    assert cli("verify", out, "--base", tiny_llama)[0] == 0
    assert cli("inspect", out)[0] == 0
    code, printed, _ = cli("delta", "apply", out, "--base", tiny_llama, "--out", applied)
    assert code == 0 and "loads without Compress" in printed
    assert Checkpoint(applied).names() == Checkpoint(finetuned).names()


@pytest.mark.parametrize("options", [(), ("--generate", "--base", "{base}"), ("--base", "{base}")])
def test_bench_of_a_delta_says_to_apply_it(options: tuple[str, ...], cli: Run, zipped: Path, tiny_llama: Path) -> None:
    code, out, said = cli("bench", zipped, *(part.format(base=tiny_llama) for part in options))
    assert (code, out, said.count("\n")) == (2, "", 1)
    assert f"{zipped}: is a delta of {tiny_llama.name}; `compress delta apply` makes a model of it" in said


@pytest.mark.slow
def test_a_delta_is_evaluated_beside_its_fine_tune(
    cli: Run, zipped: Path, tiny_llama: Path, finetuned: Path, tmp_path: Path
) -> None:
    asked = ("--base", finetuned, "--limit", 4, "--out", tmp_path / "e", "--json")
    code, printed, said = cli("eval", zipped, "--delta-base", tiny_llama, *asked)
    assert code == 0, said
    assert json.loads(printed)["results"][1]["vs"]["fidelity"]["kl"]["value"] > 0
    code, _, said = cli("eval", zipped, *asked)
    assert code == 2 and "is a delta of" in said


@pytest.mark.slow
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("method", ["auto", "dare", "delta-come", "lowrank", "sparse"])
def test_a_method_keeps_within_the_size_it_is_given(cli: Run, model_folder: Any, tmp_path: Path, method: str) -> None:
    base = model_folder("short", "bfloat16")
    asked = ("--base", base, "--method", method, "--size", "5KB", "--out", tmp_path / "d", "--json")
    code, _, said = cli("delta", "extract", tuned(base, tmp_path / "tuned"), *asked)
    assert code == 0, said
    stored = sum(row["bytes"] for row in Artifact(tmp_path / "d").provenance["sites"].values())
    assert 2_500 < stored <= 5_500  # scales of rows of 48 weigh much, chance keeps a few more


@pytest.mark.slow
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("method", "bits"), [("bitdelta", "2"), ("deltazip", "3"), ("lowrank", "4")])
def test_other_methods_have_their_own_sizes(
    cli: Run, tiny_llama: Path, finetuned: Path, tmp_path: Path, method: str, bits: str
) -> None:
    asked = ("--base", tiny_llama, "--method", method, "--bits", bits, "--out", tmp_path / "d", "--json")
    code, printed, said = cli("delta", "extract", finetuned, *asked)
    assert code == 0, said
    assert json.loads(printed)["bits_per_weight"] < float(bits) + 1.2  # scales of rows of 48 weigh much


@pytest.mark.slow
def test_auto_keeps_the_better_of_what_it_makes(
    model_folder: Any, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    base, told = model_folder("short"), list[Any]()
    finetuned = tuned(base, tmp_path_factory.mktemp("tuned") / "m")
    found = compress.extract(finetuned, base, tmp_path / "d", bits=1.0, calibration=FEW, emit=told.append)
    assert len(found.tried) == 2
    assert {event.out for event in told if isinstance(event, RunFinished)} == {str(tmp_path / "d")}
    assert found.report.kl == min(found.tried.values())
    assert Artifact(tmp_path / "d").provenance["probe"]["kl"] == found.report.kl
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    again = compress.extract(finetuned, base, tmp_path / "d", bits=1.0, calibration=FEW, force=True)
    assert again.tried == found.tried
    with pytest.raises(RecipeError, match="exists"):
        compress.extract(finetuned, base, tmp_path / "d", bits=1.0)
    with pytest.raises(RecipeError, match="not allowed"):
        compress.extract(finetuned, base, tmp_path / "e", method="bitdelta", embeddings="half")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.slow
def test_scales_alone_are_distilled(cli: Run, tiny_llama: Path, finetuned: Path, tmp_path: Path) -> None:
    asked = ("--base", tiny_llama, "--json")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "passes: [bitdelta, {finetune: {steps: 8, held_out: 2}}]\ncalibration: {samples: 12, length: 32}\n"
    )
    plain = tmp_path / "p.yaml"
    plain.write_text("passes: [bitdelta]\ncalibration: {samples: 12, length: 32}\n")
    for file, out in ((recipe, "learned"), (plain, "plain")):
        assert cli("delta", "extract", finetuned, *asked, "--recipe", file, "--out", tmp_path / out)[0] == 0
    one, other = Artifact(tmp_path / "learned"), Artifact(tmp_path / "plain")
    assert recipes_of("bitdelta", 1.0, 8)[0][1] == FineTune(steps=8)
    for site in one.specs:
        match one.difference(site), other.difference(site):
            case Signs(learned), Signs(first):
                if "layers.0" in site:  # later blocks see another input, and start from other scales
                    assert torch.equal(learned, first)
            case _:
                pytest.fail(site)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "zip"), "--method: 'zip' is unknown"),
        (("--bits", "0"), "--bits: 0.0 is not allowed"),
        (("--method", "bitdelta", "--bits", "0.5"), "--bits: 0.5 is less than"),
        (("--method", "deltazip", "--bits", "1"), "--bits: deltazip takes 2 or 3"),
        (("--recipe", "nowhere.yaml"), "no recipe file"),
        (("--recipe", "rtn-int4", "--bits", "2"), "--bits: cannot be combined with --recipe"),
        (("--size", "1GB"), "--size: 1GB is not less than"),
        (("--method", "sparse", "--distill", "5"), "--distill: sparse has no scales"),
        (("--bits", "1", "--size", "1MB"), "--size: cannot be combined with --bits"),
        (("--size", "much"), "--size: 'much' is not a size"),
        (
            ("--method", "dare", "--data", "nowhere.txt"),
            "error: --data: dare uses no calibration data; leave --data out",
        ),
        (("--method", "sparse", "--data", "nowhere.txt"), "error: --data: 'nowhere.txt' cannot be read"),
    ],
)
def test_bad_methods_are_one_line(
    cli: Run, finetuned: Path, tiny_llama: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, _, said = cli("delta", "extract", finetuned, "--base", tiny_llama, "--out", tmp_path / "o", *arguments)
    assert code == 2
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_the_options_of_an_extraction_are_called_as_they_are_written(cli: Run, finetuned: Path, tmp_path: Path) -> None:
    code, _, said = cli("delta", "extract", finetuned, "--base", finetuned, "--out", tmp_path / "o")
    assert code == 2 and said.startswith("error: --base: ") and "is the model itself" in said


def test_a_size_for_a_model_without_matrices_is_refused(cli: Run, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", n_embd=8, n_layer=0, n_head=2, vocab_size=211, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    asked = ("--base", tmp_path / "m", "--size", "5KB", "--out", tmp_path / "o")
    code, _, said = cli("delta", "extract", tmp_path / "m", *asked)
    assert code == 2 and "--size: 5KB is not less than the 0 bytes of the uncompressed matrices" in said
