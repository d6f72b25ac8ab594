"""`compress plan`: its bytes equal the artifact's, its memory is close to that of a run, and it reads no weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import (
    FP8,
    GPTQ,
    MXFP4,
    OWL,
    RTN,
    SVD,
    ArtifactError,
    Calibration,
    Delta,
    FineTune,
    FlexRound,
    Magnitude,
    PlanError,
    Recipe,
    RecipeError,
    Repair,
    Rotate,
    Site,
    SLiM,
    Swaps,
    UnsupportedWeight,
    Wanda,
    WeightPass,
    journal,
    run,
)
from compress.artifact import Artifact
from compress.calibration import draw
from compress.model.source import BUILTIN, Checkpoint
from compress.model.travellers import CPU_TOKENS
from compress.passes import PASSES, Pass
from compress.passes.pruning.sensitivity import Sensitivity
from compress.planning import Machine, Plan, plan_run
from compress.planning.costs import modelled, not_modelled
from compress.planning.machine import measure, place, read, write
from compress.planning.resources import CODE, VERSION_1, VERSION_2, held_together, within_group, within_limit
from compress.planning.seconds import forwards_of
from compress.planning.sizes import plan_sites
from compress.recipe import load
from compress.stats import Gram
from compress.weights import Dense, Weight

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
MACHINE = Machine(
    device="test", version="0", threads=1, float32=1e11, bfloat16=2e11, float16=1e9, eigen=4e9, memory=5e10, disk=5e8,
    call=3e-6,
)  # fmt: skip
FEW = Calibration(samples=4, length=32)
DEPENDS = {  # on values: counts, ranks or bits that a budget shares out, permutations that may not pay, bands of bits
    "best-50", "best-lowrank-30", "delta-come-3bit", "global-50", "mixed-int3", "owl-70", "ria-2of4-permuted",
    "sensitivity-70", "shared-lowrank-30", "welore-20",
}  # fmt: skip
NOT_MODELLED: dict[str, str] = {}  # passes of ours that have no row of costs, and why
Command = Callable[..., tuple[int, str, str]]
REFUSED: dict[str, tuple[tuple[Pass, ...], str]] = {
    "factors of a grid": ((RTN(group=8), Magnitude(factors=True)), "needs a dense weight; .* is already int4g8"),
    "a mask beside a mask": ((Magnitude(), SLiM(sparsity=0.5, group=8)), "is already 50%m; leave out sparsity"),
    "the rounding of floats": ((FP8(), FlexRound(steps=1)), "cannot be learned: it is e4m3row"),
    "swaps of blocks": ((Magnitude(scope="8x8"), Swaps()), "swaps moves single weights; .* is pruned in blocks"),
    "the scales of floats": ((FP8(), FineTune(steps=1)), "the real numbers of e4m3row cannot be learned"),
}


@pytest.fixture
def command(cli: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """`compress plan` with a machine that was measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(MACHINE, place("cpu"))
    return partial(cli, "plan")


def planned(model: Path, *passes: Pass, **options: Any) -> Plan:
    return plan_run(model, Recipe(passes=passes, calibration=FEW), machine=MACHINE, **options)


def made(model: Path, out: Path, *passes: Pass) -> Artifact:
    return Artifact(run(model, list(passes), out, calibration=FEW).out)


# -- bytes -----------------------------------------------------------------------------------------

EXACT: dict[str, list[Pass]] = {
    "magnitude": [Magnitude(sparsity=0.5)],
    "blocks": [Magnitude(sparsity=0.5, scope="8x8")],
    "2:4 int4": [Wanda(sparsity="2:4"), GPTQ(bits=4, group=24)],
    "half of the sites": [RTN(bits=3, group=8, sites="*mlp*")],
    "symmetric rows": [RTN(bits=8, group=0, symmetric=True)],
    "factors": [SVD(removed=0.3), RTN(bits=4, group=8, factors=True)],
    "one factor for an input": [SVD(removed=0.3, shared=True)],
    "behind a rotation": [Rotate(), RTN(bits=4, group=0)],
    "a correction": [RTN(bits=2, group=8), Repair(rank=4, metric="plain")],
}


@pytest.mark.slow
@pytest.mark.parametrize("passes", EXACT.values(), ids=EXACT)
def test_bytes_are_those_of_the_artifact(passes: list[Pass], tiny_llama: Path, tmp_path: Path) -> None:
    plan, artifact = planned(tiny_llama, *passes), made(tiny_llama, tmp_path / "o", *passes)
    told = artifact.provenance
    assert plan.exact
    assert (plan.bytes, plan.most) == (told["sizes"]["bytes"], told["sizes"]["bytes"])
    assert plan.bits_per_weight == pytest.approx(told["sizes"]["bits_per_weight"], rel=1e-12)
    own = {site.site: (site.bytes, site.forms[-1]) for site in plan.sites if site.steps}
    assert own == {name: (row["bytes"], row["weight"]) for name, row in told["sites"].items()}


def test_a_mask_of_few_entries_is_foreseen_by_chance_and_bounded(tiny_llama: Path, tmp_path: Path) -> None:
    passes = [Magnitude(sparsity=0.8)]
    plan, artifact = planned(tiny_llama, *passes), made(tiny_llama, tmp_path / "o", *passes)
    real = artifact.provenance["sizes"]["bytes"]
    assert not plan.exact
    assert real <= plan.most
    assert plan.bytes == pytest.approx(real, rel=0.01)


@pytest.mark.slow
def test_what_a_budget_shares_out_is_bounded(tiny_llama: Path, tmp_path: Path) -> None:
    passes = [OWL(spread=0.2), Wanda(sparsity=0.5), GPTQ(bits=4, group=24)]
    plan, artifact = planned(tiny_llama, *passes), made(tiny_llama, tmp_path / "o", *passes)
    real = artifact.provenance["sizes"]["bytes"]
    assert not plan.exact
    assert real <= plan.most
    assert plan.bytes == pytest.approx(real, rel=0.05)
    assert {site.note for site in plan.sites} == {"distributed by a budget"}


@pytest.mark.slow
def test_a_mean_number_of_bits_is_counted_between_whole_bits(tiny_llama: Path, tmp_path: Path) -> None:
    passes = [Sensitivity(bits=3.5), RTN(bits=8, group=24)]
    plan, artifact = planned(tiny_llama, *passes), made(tiny_llama, tmp_path / "o", *passes)
    real = artifact.provenance["sizes"]["bytes"]
    low, high, most = (planned(tiny_llama, RTN(bits=bits, group=24)).bytes for bits in (3, 4, 8))
    assert planned(tiny_llama, Sensitivity(bits=8), RTN(bits=4, group=24)).bytes == most
    assert plan.bytes == pytest.approx((low + high) / 2, abs=len(plan.sites))
    assert real <= plan.most and plan.bytes == pytest.approx(real, rel=0.02)


def test_a_pass_that_says_nothing_is_counted_as_it_was(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.passes.base.PASSES", dict(PASSES))

    @dataclass(frozen=True, kw_only=True)
    class Silent(WeightPass, name="silent"):
        """Says nothing of its form."""

        def rewrite(self, site: Site) -> Weight:
            return Dense(site.weight.dense())

    plan = planned(tiny_llama, Silent())
    assert not plan.exact
    assert plan.bytes == plan.source_bytes
    assert {site.note for site in plan.sites} == {"size depends on the values; counted at its size before the pass"}
    assert plan.unmodelled == ("silent",)


def small_mixtral(folder: Path, dtype: torch.dtype, experts: int = 3) -> Path:
    """Two blocks of three experts, or of another number."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config: dict[str, Any] = {
        "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": experts, "num_experts_per_tok": 1, "vocab_size": 211,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **config)).to(dtype).save_pretrained(folder)
    return folder


def test_experts_are_measured_together(tmp_path: Path, walk_of: Any) -> None:
    """One pass over the tokens measures all experts of a layer, and each token reaches as many of them as before."""
    gram, forwards, held = Gram.nbytes(48), [], []
    for experts in (3, 12):
        walk = walk_of(small_mixtral(tmp_path / str(experts), torch.float32, experts))
        for ordering in ("site", "block"):
            recipe = Recipe(passes=(GPTQ(group=8, sites="*experts*"),), ordering=ordering)
            plans = plan_sites(walk, recipe)
            forwards.append(forwards_of(walk, recipe, plans, 48))
            sizes = {p.site: Gram.nbytes(p.shape[1]) for p in plans.values() if "layers.0" in p.site and p.steps}
            held.append(held_together(walk, recipe, sizes) / experts)
    assert forwards[2] < forwards[0] + 1 and forwards[3] < forwards[1] + 1
    assert held[0] == held[2] >= gram and held[1] == held[3] > held[0]


def test_experts_that_are_left_beside_others_are_counted(tmp_path: Path) -> None:
    folder = small_mixtral(tmp_path / "m", torch.float32)
    step = RTN(bits=4, group=8, sites="*experts.0.*")
    plan, artifact = planned(folder, step), made(folder, tmp_path / "o", step)
    assert (plan.exact, plan.bytes) == (True, artifact.provenance["sizes"]["bytes"])


def small_llama(folder: Path, width: int, inner: int, blocks: int, tokenizer: Path) -> Path:
    """A random bfloat16 llama with the tokenizer of another folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=width // 32,
        num_key_value_heads=width // 64, vocab_size=4096, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
        pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sides every packaged recipe's groups divide."""
    return small_llama(tmp_path_factory.mktemp("small") / "m", 128, 256, 1, BUILTIN)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_packaged_recipe_takes_what_was_foreseen(path: Path, small_model: Path, tmp_path: Path) -> None:
    if path.stem == "shortgpt-25":  # of which a quarter of the blocks are one
        small_model = small_llama(tmp_path / "m", 128, 256, 4, small_model)
    recipe = load(path, ["calibration.samples=8", "calibration.length=32", "limits.max_fallbacks=1000"])
    steps = [replace(step, steps=2, held_out=4) if hasattr(step, "held_out") else step for step in recipe.passes]
    recipe = replace(recipe, passes=tuple(steps), accept=None, model=None)
    plan = plan_run(small_model, recipe, machine=MACHINE)
    told = Artifact(run(small_model, recipe, tmp_path / "o").out).provenance
    real = told["sizes"]["bytes"]
    assert plan.exact == (path.stem not in DEPENDS)
    assert real == plan.bytes if plan.exact else real <= plan.most
    exact = {site.site: (site.bytes, site.forms[-1]) for site in plan.sites if site.exact and site.steps}
    assert exact == {name: (told["sites"][name]["bytes"], told["sites"][name]["weight"]) for name in exact}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_packaged_recipe_is_modelled(path: Path) -> None:
    assert not_modelled(load(path)) == []


def test_each_pass_is_modelled_or_it_is_said_why_not() -> None:
    own = {name: step for name, step in PASSES.items() if step.__module__.startswith("compress.")}
    assert {name for name, step in own.items() if not modelled(step)} == set(NOT_MODELLED)


# -- what else it says -----------------------------------------------------------------------------


def test_classes_add_up(tiny_llama: Path) -> None:
    plan = planned(tiny_llama, RTN(bits=4, group=8))
    assert sum(row.bytes for row in plan.classes) == plan.bytes
    assert sum(row.source_bytes for row in plan.classes) == plan.source_bytes
    names = {row.name: row.tensors for row in plan.classes}
    assert names == {"rewritten sites": 14, "embeddings and head": 2, "norms and biases": 5}


def test_contracts_say_what_is_taken_given_and_kept(tiny_llama: Path) -> None:
    passes = planned(tiny_llama, Wanda(sparsity="2:4"), GPTQ(bits=4, group=24)).passes
    assert [(row.name, row.requires, row.gives, row.keeps) for row in passes] == [
        ("wanda", ("ColumnNorm",), "pruned", ()),
        ("gptq", ("Gram",), "quantized", ("mask",)),
    ]
    assert (passes[1].before, passes[1].after, passes[1].sites) == ("2:4", "2:4·int4g24", 14)
    assert "pruned" in passes[1].takes


def test_passes_that_do_not_fit_together_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match=r"passes\[1\]\.wanda: takes a dense weight; .* is quantized by then"):
        planned(tiny_llama, RTN(bits=4, group=8), Wanda())


@pytest.mark.parametrize(("steps", "said"), REFUSED.values(), ids=REFUSED)
def test_what_a_run_refuses_a_plan_refuses_with_the_same_line(
    steps: tuple[Pass, ...], said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedWeight, match=said):
        planned(tiny_llama, *steps)
    with pytest.raises(UnsupportedWeight, match=said):
        made(tiny_llama, tmp_path / "o", *steps)


def test_what_holds_no_number_to_learn_is_refused(small_model: Path) -> None:
    with pytest.raises(UnsupportedWeight, match=r"finetune: .*q_proj is mxfp4\w*, of which nothing can be learned"):
        planned(small_model, MXFP4(), FineTune(steps=1))


def test_a_pruner_of_factors_gives_the_form_it_was_given(tiny_llama: Path) -> None:
    passes = planned(tiny_llama, SVD(removed=0.3), Magnitude(factors=True), RTN(group=0, factors=True)).passes
    assert [row.gives for row in passes] == ["factored", "factored", "quantized"]


def test_no_weight_and_no_calibration_data_is_read(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("read")

    monkeypatch.setattr(Checkpoint, "stored_tensor", refuse)
    monkeypatch.setattr("compress.plan.draw", refuse)
    assert draw is not refuse
    assert planned(tiny_llama, Wanda(), GPTQ(bits=4, group=24)).exact


def test_licence_and_trust_are_told(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    bare = planned(folder, RTN(bits=4, group=8))
    assert (bare.licence, bare.trust) == ({}, ())
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: a/b\ntags: [x]\n---\n# A model\n")
    (folder / "LICENSE").write_text("\n  Apache License\n  Version 2.0\n")
    (folder / "modeling_x.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_x.X"}}))
    told = planned(folder, RTN(bits=4, group=8))
    assert told.licence == {"license": "apache-2.0", "base_model": "a/b", "LICENSE": "Apache License"}
    assert [flag.split(" ")[0] for flag in told.trust] == ["config.json", "holds", "pickled"]


@pytest.mark.parametrize(
    "card", ["", "# no dashes", "---\n[: bad\n---\n", "---\n- a list\n---\n", "---\na: &x 1\n---\n"]
)
def test_a_card_that_says_nothing_is_no_error(card: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    (folder / "README.md").write_text(card)
    assert planned(folder, RTN(bits=4, group=8)).licence == {}


def test_a_link_with_signs_of_yaml_in_it_is_read(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    (folder / "README.md").write_text("---\nlicense_link: https://a/b?c=1&d=2\nterms: |\n  *all* !of\n---\n")
    assert planned(folder, RTN(bits=4, group=8)).licence == {"license_link": "https://a/b?c=1&d=2"}


# -- whether it fits -------------------------------------------------------------------------------


def test_what_will_not_fit_is_an_error_with_the_amount(tiny_llama: Path) -> None:
    needed = planned(tiny_llama, RTN(bits=4, group=8)).needs["disk"].bytes
    plan = planned(tiny_llama, RTN(bits=4, group=8), disk=needed - 1)
    with pytest.raises(PlanError, match=r"disk: .* bytes needed, .* available \(the limit given\): 1 short"):
        plan.check()
    planned(tiny_llama, RTN(bits=4, group=8), disk=needed).check()


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_the_disk_takes_what_was_foreseen(offload: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the states of two blocks, without which a killed run could not go on; they are most of it here."""
    seen = []

    def weighed(path: Path, value: Any) -> None:
        partial_folder = tmp_path / "o.partial"
        seen.append(sum(file.stat().st_size for file in partial_folder.rglob("*.*") if file.is_file()))
        written(path, value)

    written = journal.write
    model = small_llama(tmp_path / "m", 64, 96, 4, BUILTIN)
    recipe = Recipe(passes=(Wanda(),), calibration=Calibration(samples=64, length=64))
    plan = plan_run(model, recipe, machine=MACHINE, offload=offload)
    monkeypatch.setattr(journal, "write", weighed)
    run(model, recipe, tmp_path / "o", offload=offload)
    assert plan.needs["disk"].bytes == pytest.approx(max(seen), rel=0.1)


@pytest.mark.slow
def test_a_run_and_its_plan_agree_on_whether_the_disk_will_do(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small artifact needs no room for the model it is made of."""
    recipe = Recipe(passes=(RTN(bits=4, group=8),), calibration=FEW)
    needed = plan_run(tiny_llama, recipe, machine=MACHINE).needs["disk"].bytes
    assert needed < Checkpoint(tiny_llama).nbytes()
    for free, fits in ((needed, True), (needed - 100, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        plan = plan_run(tiny_llama, recipe, machine=MACHINE)
        if fits:
            plan.check()
            run(tiny_llama, recipe, tmp_path / "o")
            continue
        with pytest.raises(PlanError, match="disk: "):
            plan.check()
        with pytest.raises(PlanError, match=r"bytes are free, the run may need .* more \(tensors .*, hidden states "):
            run(tiny_llama, recipe, tmp_path / "more")
        assert not (tmp_path / "more").exists() and not (tmp_path / "more.partial").exists()


def hidden_states(model: Path, samples: int, offload: bool = False) -> int:
    recipe = Recipe(passes=(GPTQ(group=24),), calibration=Calibration(samples=samples, length=64))
    return plan_run(model, recipe, machine=MACHINE, offload=offload).needs["memory"].parts["hidden states"]


def test_more_windows_need_more_memory_unless_they_are_offloaded(tiny_llama: Path) -> None:
    few, many = hidden_states(tiny_llama, 128), hidden_states(tiny_llama, 256)
    assert many - few == 128 * 64 * 48 * 4
    assert hidden_states(tiny_llama, 256, offload=True) < few


def test_where_a_gpu_computes_the_host_holds_files_and_copies(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.planning.resources.video_memory", lambda device: (10**12, "a GPU"))
    base = shutil.copytree(tiny_llama, tmp_path / "base")

    def held(offload: bool, **options: Any) -> dict[str, int]:
        recipe = Recipe(passes=(GPTQ(group=24),), calibration=Calibration(samples=128, length=64), **options)
        found = plan_run(tiny_llama, recipe, machine=MACHINE, offload=offload).needs
        assert found["vram"].there == 10**12 and "hidden states" in found["vram"].parts
        return dict(found["memory"].parts)

    assert held(False, delta=Delta(base=str(base)))["page-locked copies of hidden states"] == 0

    source = Checkpoint(tiny_llama)
    frame = sum(size.nbytes for name, size in source.headers.items() if ".layers." not in name)
    assert held(False)["page-locked copies of hidden states"] == 8 * 2**18  # 1,024 tokens of 48 float32
    assert held(False)["embeddings and head"] == frame
    assert held(True)["page-locked copies of hidden states"] == 0


def test_experts_of_16_bits_need_memory_for_the_sizes_of_their_products(tmp_path: Path) -> None:
    """Two products an expert in each batch, and two more if the inputs' Grams are taken; none where others compute."""

    def need(folder: Path, *passes: Pass) -> int:
        recipe = Recipe(passes=passes, calibration=Calibration(samples=40, length=64))
        return plan_run(folder, recipe, machine=MACHINE).needs["memory"].parts["kernels cached by oneDNN"]

    half = small_mixtral(tmp_path / "half", torch.bfloat16)
    batches = -(-40 // (CPU_TOKENS // 64))
    assert need(half, Wanda()) == CODE * batches * 2 * 3 * 2
    assert need(half, GPTQ(group=8)) == 2 * need(half, Wanda())
    assert need(small_mixtral(tmp_path / "whole", torch.float32), Wanda()) == 0


def test_the_limit_of_a_control_group_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert within_group(tmp_path) == 2000
    stat = "anon 300\ninactive_file 500\nactive_file 200\n"  # files that the kernel drops when memory is asked for
    (tmp_path / "memory.stat").write_text(stat)
    assert within_group(tmp_path) == 2700
    (tmp_path / "memory.stat").write_text(f"{stat}total_inactive_file 600\ntotal_active_file 900\n")  # version 1
    assert within_group(tmp_path) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert within_group(tmp_path) is None


@pytest.mark.parametrize(("kind", "names"), [("", VERSION_2), ("cpu,memory", VERSION_1)])
def test_the_group_within_a_group_counts(kind: str, names: tuple[str, str], tmp_path: Path) -> None:
    """As batch schedulers and services make them; what is outside of what can be seen is left out."""
    told, top = tmp_path / "told", tmp_path / ("memory" if kind else "")
    told.write_text(f"5:cpuset:/elsewhere\n4:{kind}:/slice/job\n")
    for group, most in (("", "9000"), ("slice", "4000"), ("slice/job", "max")):
        (top / group).mkdir(exist_ok=True, parents=True)
        for name, value in zip(names, (most, "1000"), strict=True):
            (top / group / name).write_text(f"{value}\n")
    assert within_group(tmp_path, told) == 3000
    assert within_group(tmp_path / "none", told) is None


@pytest.mark.slow
def test_a_limit_of_the_process_counts() -> None:
    code = "from compress.planning.resources import free_memory, within_limit; print(free_memory(), within_limit())"
    line = f"ulimit -v 4000000; {sys.executable} -c '{code}'"
    free, left = map(int, subprocess.run(["bash", "-c", line], check=True, capture_output=True).stdout.split())
    assert 0 < left < 4_000_000 * 1024 and free <= left
    assert within_limit() is None


def test_the_command_exits_with_3_and_one_line(command: Command, tiny_llama: Path) -> None:
    code, out, err = command("rtn-int8", "--model", tiny_llama, "--memory", "1MB")
    assert code == 3
    assert err.count("\n") == 1 and err.startswith("error: it will not fit: memory: ")
    assert "rewritten sites" in out


def test_the_command_shows_tables_and_sites(command: Command, tiny_llama: Path) -> None:
    code, out, err = command("rtn-int8", "--model", tiny_llama, "--sites")
    assert (code, err) == (0, "")
    for said in (
        "exactly",
        "model.layers.1.mlp.down_proj",
        "int8rows",
        "licence: not stated",
        "nothing that could run",
    ):
        assert said in out


def test_the_command_gives_json(command: Command, tiny_llama: Path) -> None:
    code, out, _ = command("rtn-int8", "--model", tiny_llama, "--json")
    told = json.loads(out)
    assert code == 0
    assert told["exact"] is True and len(told["sites"]) == 14
    assert told["needs"]["memory"]["fits"] is True
    assert told["total_seconds"] == pytest.approx(sum(told["seconds"].values()))


def test_the_base_of_a_delta_is_looked_at(tiny_llama: Path, model_folder: Any, tmp_path: Path) -> None:
    recipe = Recipe(passes=(RTN(bits=4, group=24),), delta=Delta(base=str(model_folder("qwen2"))))
    with pytest.raises(ArtifactError, match=r"is a llama, its base .* a qwen2"):
        plan_run(tiny_llama, recipe, out=tmp_path / "o", machine=MACHINE)


def test_what_other_passes_have_is_excluded_from_sites(tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match=r'down_proj is quantized by then; leave it out, with sites: "!\*down_proj"'):
        planned(tiny_llama, RTN(bits=8, group=24, sites="*down_proj"), RTN(bits=4, group=24))
    plan = planned(tiny_llama, RTN(bits=8, group=24, sites="*down_proj"), RTN(bits=4, group=24, sites="!*down_proj"))
    assert {site.forms[-1] for site in plan.sites if site.site.endswith("down_proj")} == {"int8g24"}
    assert {site.forms[-1] for site in plan.sites if not site.site.endswith("down_proj")} == {"int4g24"}


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no such recipe": (("nothing-like-it", "--model", "builtin"), "no recipe file"),
    "no such model": (("rtn-int8", "--model", "/nowhere"), "no model folder"),
    "no size": (("rtn-int8", "--model", "builtin", "--memory", "lots"), "--memory: 'lots' is not a size"),
    "no device": (("rtn-int8", "--model", "builtin", "--device", "tpu"), "--device: 'tpu' is unknown"),
    "a file": (
        ("rtn-int8", "--model", "builtin", "--out", __file__),
        f"--out: {__file__} exists; choose another folder",
    ),
    "no name": (("rtn-int8", "--model", "builtin", "--out", "n" * 300), "--out: File name too long: "),
    "unfit groups": (("rtn-int8", "--model", "builtin", "--set", "passes.0.group=7"), "group 7 does not divide"),
}


@pytest.mark.parametrize(("line", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(line: tuple[str, ...], said: str, command: Command) -> None:
    code, out, err = command(*line)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


# -- the machine -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_machine_is_measured_once_and_kept(tmp_path: Path) -> None:
    found = measure("cpu")
    assert found.float32 > 1e8 and found.memory > 1e7 and 0 < found.call < 1
    write(found, tmp_path / "a" / "m.json")
    assert read(tmp_path / "a" / "m.json") == found


def test_brackets_in_the_name_of_a_model_stay(command: Command, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m[bold]")
    assert command("magnitude-50", "--model", tmp_path / "m[bold]")[1].startswith("m[bold] (llama")


def test_a_cache_that_cannot_be_written_stops_no_plan(
    cli: Command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("compress.planning.machine.measure", lambda kind: MACHINE)
    code, out, err = cli("plan", "magnitude-50", "--model", tiny_llama)
    assert (code, err) == (0, "")
    assert f"the machine is measured again each time: {place('cpu')} cannot be written" in out


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1}'])
def test_a_damaged_profile_is_refused_with_the_remedy(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(RecipeError, match=r"m\.json: is not a machine profile: .*; delete it to measure again"):
        read(tmp_path / "m.json")


def test_a_profile_that_cannot_be_kept_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "m.json").mkdir()
    with pytest.raises(RecipeError, match=r"m\.json: cannot be written"):
        write(MACHINE, tmp_path / "m.json")
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


def test_rates_must_be_positive(tmp_path: Path) -> None:
    write(replace(MACHINE, eigen=0.0), tmp_path / "m.json")
    with pytest.raises(RecipeError, match="rates must be positive"):
        read(tmp_path / "m.json")


def test_a_faster_machine_takes_less_time(tiny_llama: Path) -> None:
    slow = planned(tiny_llama, GPTQ(bits=4, group=24))
    fast = plan_run(
        tiny_llama,
        Recipe(passes=(GPTQ(bits=4, group=24),), calibration=FEW),
        machine=replace(MACHINE, float32=1e13, bfloat16=1e13),
    )
    assert fast.seconds["forward passes"] == pytest.approx(slow.seconds["forward passes"] / 100)


RUNNER = """
import os, sys
with open(sys.argv[1], "wb") as out:
    child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1)])
_, status, used = os.wait4(child, 0)
print(os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024)
"""
LINES = """
import json, sys
from compress.cli import main
for line in json.loads(sys.argv[1]):
    sys.argv = ["compress", *line]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
"""


MEASURED: dict[str, list[str]] = {  # a solver, a mask, what looks ahead, twins, what learns
    "gptq-int4": [],
    "magnitude-50": [],
    "awq-int4": ["passes.0.steps=4"],
    "realign-gptq-int2": [],
    "flexround-int2": ["passes.1.steps=2", "passes.1.held_out=4"],
}


def commands_in_a_process(out: Path, *lines: list[str]) -> tuple[dict[str, Any], int]:
    """What the first of some commands prints as JSON, and the largest size of the process of all.

    A small process starts it: the peak of a child begins with that of its parent, and pytest is large.
    """
    command = [sys.executable, "-c", RUNNER, str(out), sys.executable, "-c", LINES, json.dumps(lines)]
    code, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(code) == 0
    return json.JSONDecoder().raw_decode(out.read_text())[0], int(peak)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in kilobytes, /proc")
@pytest.mark.parametrize(("recipe", "changes"), MEASURED.items(), ids=MEASURED)
def test_peak_memory_is_within_a_fifth(
    recipe: str, changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(MACHINE, place("cpu"))
    folder = small_llama(tmp_path / "m", 768, 2048, 1, BUILTIN)
    sets = [part for change in ("calibration.samples=6", *changes) for part in ("--set", change)]
    options = [recipe, "--model", str(folder), *sets, "--json"]
    run_ = ["run", *options, "--out", str(tmp_path / "o"), "--set", "limits.max_fallbacks=1000"]
    plan, peak = commands_in_a_process(tmp_path / "said", ["plan", *options], run_)
    assert plan["needs"]["memory"]["bytes"] == pytest.approx(peak, rel=0.2)
