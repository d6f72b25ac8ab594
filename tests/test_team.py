"""One run on several processes: the same bytes as on one, and a prompt end if one of them fails.

The processes are started by `several.py` with the environment that torchrun provides; one test starts torchrun itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import Dense, External, Grid, Masked, Permutation, Product, Sum, UnsupportedWeight, Weight
from compress.team import ALONE, Team, flat, span
from compress.weights import put_together, taken_apart

FEW = "calibration: {samples: 23, length: 32}\n"
RECIPES = {
    "solved": FEW + "passes: [{wanda: {sparsity: 2:4}}, {gptq: {group: 8, target: original}}]\n",
    "experts": "calibration: {samples: 24, length: 64}\nlimits: {max_starved: 1}\n"
    "passes: [{sparsegpt: {sparsity: 0.5, sites: '*experts*'}}, {rtn: {group: 8}}]\n",
    "shaped": FEW + "passes:\n  - wanda-sp: {neurons: 0.25}\n  - realign\n  - svd-llm: {removed: 0.5, shared: true}\n",
    "spread": FEW + "ordering: dense\npasses: [owl, {wanda: {sparsity: 0.6}}]\n",
    "inner": FEW + "passes: [{gptq: {group: 8, sites: '*mlp*'}}]\n",
    "free": "passes: [{rtn: {group: 8}}]\n",
    "whole": FEW + "passes: [{rtn: {group: 8}}, flexround]\n",
}
SOON = 20.0  # seconds in which all have ended once one has; most of it is for a machine that does other things too
Order = Callable[..., dict[str, Any]]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of three blocks, and a tiny mixture of experts."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    experts = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12}
    plain = AutoConfig.from_pretrained(tiny_llama).to_dict() | {"num_hidden_layers": 3}
    mixed = {k: v for k, v in plain.items() if k not in ("model_type", "architectures")}
    configs = {
        "llama": AutoConfig.from_pretrained(tiny_llama, num_hidden_layers=3),
        "mixtral": AutoConfig.for_model("mixtral", **{**mixed, **experts, "num_hidden_layers": 2}),
    }
    made = {}
    for name, config in configs.items():
        torch.manual_seed(3)
        made[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(made[name])
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def order(models: dict[str, Path], forks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Order:
    """`order(size, recipe, out, *options, model="llama", ...)`: what a run in so many processes answers."""
    place = tmp_path_factory.mktemp("recipes")
    for name, text in RECIPES.items():
        (place / f"{name}.yaml").write_text(text)

    def ask(size: int, recipe: str, out: Path, *options: str, model: str = "llama", **wanted: Any) -> Any:
        named = [str(place / f"{recipe}.yaml"), str(models[model]), str(out)]
        arguments = named if "grouped" in wanted else ["run", named[0], "--model", named[1], "--out", named[2]]
        return forks(size=size, arguments=[*arguments, *options], **wanted)

    return ask


@pytest.fixture(scope="module")
def alone(order: Order, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """`alone(recipe, model="llama")`: the hashes of what one process makes."""
    made: dict[str, dict[str, str]] = {}

    def make(recipe: str, model: str = "llama") -> dict[str, str]:
        if recipe not in made:
            out = tmp_path_factory.mktemp(recipe) / "o"
            answer = order(1, recipe, out, model=model)
            assert answer["codes"] == [0], answer["err"]
            made[recipe] = hashes(out)
        return made[recipe]

    return make


# -- the same bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "recipe", "model", "options"),
    [
        (2, "solved", "llama", ()),
        (3, "solved", "llama", ("--offload",)),
        pytest.param(2, "experts", "mixtral", (), marks=pytest.mark.slow),
        pytest.param(2, "shaped", "llama", (), marks=pytest.mark.slow),
        pytest.param(3, "experts", "mixtral", (), marks=pytest.mark.slow),
        pytest.param(2, "spread", "llama", (), marks=pytest.mark.slow),
        pytest.param(7, "solved", "llama", (), marks=pytest.mark.slow),  # more than there are batches
        pytest.param(2, "free", "llama", (), marks=pytest.mark.slow),
    ],
)
def test_several_processes_write_the_bytes_of_one(
    size: int, recipe: str, model: str, options: tuple[str, ...], order: Order, alone: Any, tmp_path: Path
) -> None:
    whole = alone(recipe, model)
    answer = order(size, recipe, tmp_path / "o", *options, model=model)
    assert answer["codes"] == [0] * size, answer["err"]
    assert hashes(tmp_path / "o") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    assert f"{size} processes" in answer["err"][0] and not any(answer["err"][1:])


@pytest.mark.slow
def test_a_script_with_a_process_group_of_its_own_keeps_it(order: Order, alone: Any, tmp_path: Path) -> None:
    answer = order(2, "solved", tmp_path / "o", grouped=True)
    assert answer["codes"] == [0, 0], answer["err"]
    assert answer["out"][0] and answer["out"][0] == answer["out"][1]
    assert hashes(tmp_path / "o") == alone("solved")


@pytest.mark.slow
def test_torchrun_starts_them(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "free.yaml"
    recipe.write_text(RECIPES["free"])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "compress", "run"]
    options = [str(recipe), "--model", str(models["llama"]), "--out", str(tmp_path / "o"), "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(tmp_path / "o")  # of one process: two would not be JSON
    assert "2 processes" in done.stderr


# -- when one fails --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "ranks", "options"), [("SIGKILL", [1], ()), ("SIGINT", [0, 1], ("--offload",))])
def test_what_several_were_stopped_at_one_goes_on_with(
    sent: str, ranks: list[int], options: tuple[str, ...], order: Order, alone: Any, tmp_path: Path
) -> None:
    recorded = tmp_path / "o.partial" / "records" / "00001.json"
    answer = order(2, "solved", tmp_path / "o", *options, once=str(recorded), signal=sent, signalled=ranks)
    assert answer["codes"] == ([7, -9] if sent == "SIGKILL" else [130, 130]), answer["err"]
    assert answer["seconds"] < SOON
    assert recorded.exists() and not (tmp_path / "o").exists()
    assert "run the same command to resume" in answer["err"][0]
    answer = order(1 if sent == "SIGKILL" else 3, "solved", tmp_path / "o", *options)
    assert not any(answer["codes"]) and "resuming after block" in answer["err"][0]
    assert hashes(tmp_path / "o") == alone("solved")
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


@pytest.mark.slow
def test_keys_and_values_that_blocks_leave_to_others_are_found_again(
    models: dict[str, Path], gemma3n: Path, order: Order, alone: Any, tmp_path: Path
) -> None:
    models["shared"] = gemma3n
    (tmp_path / "o").mkdir()
    out = tmp_path / "o" / "o"
    once = str(tmp_path / "o" / "o.partial" / "records" / "00002.json")
    asked = {"once": once, "signal": "SIGKILL", "signalled": [0, 1]}
    assert order(2, "inner", out, model="shared", **asked)["codes"] == [-9, -9]
    answer = order(3, "inner", out, model="shared")
    assert not any(answer["codes"]) and "resuming after block 2 of 3" in answer["err"][0]
    assert hashes(out) == alone("inner", "shared")


@pytest.mark.parametrize(
    ("kind", "codes", "line"),
    [
        ("CalibrationError", [2, 2, 2], "error: made up"),
        pytest.param("MemoryError", [3, 3, 3], "error: out of memory: made up", marks=pytest.mark.slow),
        ("KeyError", [7, 1, 7], "error: process 1 of this run failed: KeyError: 'made up'"),
    ],
)
def test_what_one_meets_all_end_with_and_one_says(
    kind: str, codes: list[int], line: str, order: Order, tmp_path: Path
) -> None:
    answer = order(3, "solved", tmp_path / "o", fails=1, kind=kind)
    assert answer["codes"] == codes
    assert line in answer["err"][0] and "Traceback" not in answer["err"][0]
    assert answer["err"][2] == "" and ("Traceback" in answer["err"][1]) == (kind == "KeyError")
    assert (kind == "KeyError") == bool(answer["err"][1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "options", "wanted", "line"),
    [
        ("whole", (), {}, "passes[1].flexround: needs all windows of a block at once"),
        ("missing", (), {}, "missing.yaml"),
        ("free", ("--device", "cuda:0"), {}, "is one GPU for 2 processes"),
        ("free", (), {"threads": [1]}, "torchrun: threads: 1 in process 0, 2 in process 1"),
        ("free", ("--no-such-option",), {}, "No such option"),
    ],
)
def test_a_refusal_is_said_once(
    recipe: str, options: tuple[str, ...], wanted: dict[str, Any], line: str, order: Order, tmp_path: Path
) -> None:
    answer = order(2, recipe, tmp_path / "o", *options, **wanted)
    assert answer["codes"] == [2, 2]
    assert line in answer["err"][0] and answer["err"][0].count("error:") == 1 and answer["err"][1] == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_place_that_is_taken_is_refused_by_all(order: Order, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    answer = order(2, "free", tmp_path / "o")
    assert answer["codes"] == [2, 2] and "exists" in answer["err"][0] and answer["err"][1] == ""
    assert order(2, "free", tmp_path / "o", "--force")["codes"] == [0, 0]


def test_an_environment_without_a_meeting_place_is_refused(monkeypatch: Any, cli: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    code, _, err = cli("run", "quickstart", "--out", tmp_path / "o")
    assert code == 2 and "cannot connect to each other" in err and len(err.splitlines()) == 1
    monkeypatch.setenv("WORLD_SIZE", "two")
    code, _, err = cli("run", "quickstart", "--out", tmp_path / "o")
    assert code == 2 and "WORLD_SIZE='two'" in err


# -- the parts -------------------------------------------------------------------------------------


def test_works_are_dealt_evenly_and_always_alike() -> None:
    team = Team()
    team.size = 2
    assert team.deal([9, 3, 3]) == [0, 1, 1]
    assert team.deal([1, 1, 8, 1]) == [1, 1, 0, 1]
    assert team.deal([]) == []
    assert ALONE.deal([3, 1]) == [0, 0]


def weights() -> list[Weight]:
    w_OI = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    grid = Grid(bits=4, group=4).quantize(w_OI)
    mask_OI = w_OI > 0
    return [
        Dense(w_OI.T),
        Masked(grid, mask_OI, "50%"),
        Sum((Product(Dense(w_OI), Permutation(torch.arange(8).flip(0))), Dense(w_OI))),
        External(w_OI, "base", "tensor"),
    ]


@pytest.mark.parametrize("weight", weights(), ids=lambda w: w.describe())
def test_an_expression_is_put_together_as_it_was(weight: Weight) -> None:
    tensors: list[torch.Tensor] = []
    told = json.loads(json.dumps(taken_apart(weight, tensors)))
    again: list[torch.Tensor] = []
    made = put_together(told, tensors)
    assert taken_apart(made, again) == taken_apart(weight, [])
    assert all(one is other for one, other in zip(again, tensors, strict=True))
    assert torch.equal(made.dense(), weight.dense()) and made.describe() == weight.describe()


def test_a_foreign_node_is_refused() -> None:
    class Foreign(Dense):
        pass

    with pytest.raises(UnsupportedWeight, match="cannot be sent"):
        taken_apart(Foreign(torch.zeros(2, 2)), [])


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.T, lambda w: w[1:, 2:5], lambda w: w[:1].expand(4, -1)])
def test_a_tensor_keeps_its_layout_on_the_wire(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = view(torch.arange(42.0).view(6, 7))
    sent = flat(tensor).clone()
    assert len(sent) == span(tensor.shape, tensor.stride())
    assert torch.equal(sent.as_strided(tensor.shape, tensor.stride()), tensor)
