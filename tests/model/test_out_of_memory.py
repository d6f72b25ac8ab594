"""Out of memory in a forward pass: the batch is split into parts, and none of it is counted twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import compress
from compress import Calibration, Quantized
from compress.artifact import Artifact
from compress.errors import VerificationError
from compress.events import BatchHalved, Event
from compress.job import prove
from compress.merging import merge
from compress.model.source import Checkpoint, dtype_of
from compress.model.travellers import Travellers
from compress.model.walk import Walk
from compress.stats import ColumnNorm, Gram, Moments, Sample
from compress.verification import RuntimeWalk

SAYS = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
KINDS = (Gram, ColumnNorm, Moments, Sample)
pytestmark = pytest.mark.usefixtures("frozen")


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`only(n)`: every forward of a block with more than n windows fails, at its very end."""
    forward = Travellers._forward

    def make(most: int) -> None:
        def failing(self: Travellers, module: nn.Module, index: int, dtype: torch.dtype | None) -> Tensor:
            try:
                return forward(self, module, index, dtype)
            finally:
                if len(self.ids_BT) > most:
                    raise RuntimeError(SAYS)

        monkeypatch.setattr(Travellers, "_forward", failing)

    return make


def measured(walk: Any, ids: Tensor) -> tuple[list[Any], list[Tensor]]:
    """The statistics of each distinct input of a model, and the hidden states behind each block."""
    stats, hidden = [], []
    with torch.no_grad():
        batch = walk.enter(ids)
        for block in walk.visit([batch], walk.enter(ids[:1])):
            block.collect(block.groups, KINDS)
            stats += [group[0].stats for group in block.groups]
            block.advance()
            if not block.last:
                hidden.append(batch.hidden_BTD)
    return stats, hidden


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "hybrid"])  # one mask for all blocks, and two
def test_a_batch_in_parts_is_measured_like_the_whole(
    family: str, model_folder: Any, walk_of: Any, only: Any, assert_close: Any
) -> None:
    ids = torch.randint(4, 200, (5, 21), generator=torch.Generator().manual_seed(5))
    folder = model_folder(family)
    want, hidden = measured(walk_of(folder), ids)
    walk = walk_of(folder)
    heard: list[int] = []
    walk.fit.tell = heard.append
    only(2)
    assert walk.enter(ids).divisible
    got, parted = measured(walk, ids)
    assert heard == [3, 2]  # and no batch behind it tries more
    assert [stats.tokens for stats in got] == [stats.tokens for stats in want]
    for mine, whole in zip(got, want, strict=True):
        for kind in KINDS:
            assert_close(f"{family} {kind.__name__}", mine[kind], whole[kind], 1e-4)
    for mine, whole in zip(parted, hidden, strict=True):
        assert_close(f"{family} hidden", mine, whole, 1e-5)


@pytest.mark.slow
def test_a_batch_whose_blocks_leave_keys_for_others_is_not_divided(gemma3n: Path, walk_of: Any, only: Any) -> None:
    walk, ids = walk_of(gemma3n), torch.randint(4, 200, (5, 21))
    assert not walk.enter(ids).divisible
    only(2)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        measured(walk, ids)


def test_a_block_that_writes_over_its_inputs_is_measured_right(walk_of: Any, tiny_llama: Path, ids: Tensor) -> None:
    want, _ = measured(walk_of(tiny_llama), ids)
    walk = walk_of(tiny_llama)
    for block in walk.blocks:
        block.mlp.act_fn.register_forward_hook(lambda module, args, out: out)
        block.mlp.gate_proj.register_forward_hook(lambda module, args, out: (out, args[0].mul_(1))[0])
        block.self_attn.register_forward_hook(
            lambda module, args, kwargs, out: (out, kwargs["hidden_states"].zero_())[0], with_kwargs=True
        )
    got, _ = measured(walk, ids)
    for mine, whole in zip(got, want, strict=True):
        assert all(torch.equal(mine[kind], whole[kind]) for kind in KINDS)


RECIPE = "calibration: {samples: 6, length: 32}\npasses: [sparsegpt: {sparsity: 0.5}, gptq: {bits: 4, group: 8}]\n"


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_windows_and_says_so(tiny_llama: Path, tmp_path: Path, only: Any) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    events: list[Event] = []
    only(2)
    compress.run(tiny_llama, tmp_path / "recipe.yaml", tmp_path / "out", emit=events.append)
    assert [event.windows for event in events if isinstance(event, BatchHalved)][-1] == 2
    told = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert told["calibration"]["windows_at_once"] == 2
    assert "at most 2 calibration windows" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_merge_goes_on_with_fewer_windows_and_says_so(tiny_llama: Path, tmp_path: Path, only: Any) -> None:
    tuned = {"left": tmp_path / "left", "right": tmp_path / "right"}
    for seed, folder in enumerate(tuned.values()):
        draws = torch.Generator().manual_seed(seed)
        weights = load_file(shutil.copytree(tiny_llama, folder) / "model.safetensors")
        moved = {name: t + 0.01 * torch.randn(t.shape, generator=draws).to(t) for name, t in weights.items()}
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    few = Calibration(data="text", samples=6, length=32)
    merge(tiny_llama, tuned, tmp_path / "whole", method="regmean", calibration=few)
    only(2)
    merge(tiny_llama, tuned, tmp_path / "out", method="regmean", calibration=few)
    whole, parted = (json.loads((tmp_path / out / "compress.json").read_text())["merge"] for out in ("whole", "out"))
    assert all("windows_at_once" not in told for told in whole["calibration"].values())
    assert [told["windows_at_once"] for told in parted["calibration"].values()] == [2, 2]
    said = "while `left` was measured: at most 2 calibration windows"
    assert said in (tmp_path / "out" / "README.md").read_text()
    assert "Memory" not in (tmp_path / "whole" / "README.md").read_text()


def test_what_was_written_is_read_back_by_as_few_windows_as_fitted(tiny_llama: Path, tmp_path: Path) -> None:
    held = Checkpoint(tiny_llama)
    walk = Walk(held.config, held, dtype_of(held.config), torch.device("cpu"))
    compress.run(tiny_llama, [compress.RTN(group=8)], tmp_path / "out")
    assert RuntimeWalk(Artifact(tmp_path / "out"), walk).fit is walk.fit


def test_memory_that_runs_out_in_verify_is_not_called_damage(
    tiny_llama: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Quantized) -> Tensor:
        raise RuntimeError(SAYS)

    compress.run(tiny_llama, [compress.RTN(group=8)], tmp_path / "out")
    monkeypatch.setattr(Quantized, "dense", failing)
    code, _, err = cli("verify", tmp_path / "out")
    assert code == 3 and err.startswith("error: out of memory: ") and "decoded" not in err


@pytest.mark.slow
def test_a_window_that_does_not_fit_alone_is_one_line(tiny_llama: Path, tmp_path: Path, only: Any, cli: Any) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    only(0)
    code, _, err = cli("run", tmp_path / "recipe.yaml", "--model", tiny_llama, "--out", tmp_path / "out")
    assert code == 3 and "error: out of memory" in err.splitlines()[-1] and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_error_that_memory_has_caused_loses_no_block(
    tiny_llama: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given: Any) -> Any:
        raise VerificationError("it does not fit its specification") from RuntimeError(SAYS)

    (tmp_path / "recipe.yaml").write_text(RECIPE)
    line = ("run", tmp_path / "recipe.yaml", "--model", tiny_llama, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(RuntimeWalk, "replay", failing)
        assert cli(*line)[0] == 4
    code, _, err = cli(*line)
    assert (code, "resuming after block 2 of 2" in err) == (0, True)
    code, _, err = cli("inspect", tmp_path / "out", "--picture", tmp_path / "out" / "more.svg")
    assert code == 2 and "write the picture elsewhere" in err and not (tmp_path / "out" / "more.svg").exists()


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError(SAYS), RuntimeError("CUDA out of memory."), MemoryError()], ids=repr)
def test_memory_that_runs_out_in_a_check_is_one_line_and_loses_no_block(
    error: Exception, tiny_llama: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given: Any) -> Any:
        raise error

    (tmp_path / "recipe.yaml").write_text(RECIPE)
    line = ("run", tmp_path / "recipe.yaml", "--model", tiny_llama, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(RuntimeWalk, "replay", failing)
        code, _, err = cli(*line)
    assert code == 3 and err.splitlines()[-1].startswith("error: out of memory: ")
    code, _, err = cli(*line)
    assert (code, "resuming after block 2 of 2" in err) == (0, True)
    walk = SimpleNamespace(model=None, prove=failing)
    with pytest.raises(type(error)):  # and does not tell of the family
        prove(walk, SimpleNamespace(probe_NT=torch.zeros(1, 1)))  # type: ignore[arg-type]


LIMITED = """
import resource, sys
import compress
from compress.events import BatchHalved, BlockFinished, RunStarted
from compress.model.memory import release_early

release_early()  # as the command line does

def emit(event):
    if isinstance(event, RunStarted) and sys.argv[4] != "0":
        held = 4096 * int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[4]),) * 2)
    if isinstance(event, BatchHalved):
        print(event.windows)
    if isinstance(event, BlockFinished) and event.index + 1 == event.count:
        print("read back")

compress.run(sys.argv[1], sys.argv[2], sys.argv[3], emit=emit)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux")
def test_a_process_that_may_not_grow_halves_and_finishes(tmp_path: Path, model_folder: Any) -> None:
    """16 windows of 64 tokens make 134 MB of each of a block's inner activations, of which several live at once."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 32768, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=200, max_position_embeddings=64))
    model.save_pretrained(tmp_path / "model", max_shard_size="1MB")  # files that are mapped count against the limit
    AutoTokenizer.from_pretrained(model_folder("llama")).save_pretrained(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("calibration: {samples: 16, length: 64}\npasses: [wanda: {sparsity: 0.5}]\n")
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "model"), str(recipe), str(tmp_path / "out"), "330000000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    halved = [int(line) for line in done.stdout.partition("read back")[0].split()]
    assert halved and halved == [16 >> i for i in range(1, len(halved) + 1)]
    told = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert told["calibration"]["windows_at_once"] == halved[-1]
