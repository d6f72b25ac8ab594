"""The peer benchmark, as far as it can be tested without the other tools: measurement, metric, tables, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress.export.words import to_words
from compress.model.source import Checkpoint
from compress.weights import Grid
from compress_evals.peers import job, subjects
from compress_evals.peers.__main__ import JOB, main
from compress_evals.peers.lines import Line, append, document, read
from compress_evals.peers.score import Quality, decoded_gptq, layer_errors, two_of_four

MIB = 1 << 20
GOOD = Quality(error=0.1, worst=0.2, kl=0.01, zeros=0.5, two_of_four=True, rest=True, scores={})


def line(tool: str, cpu: list[float], peak: int, **changes: Any) -> Line:
    runs = [
        {"cpu": each, "wall": 2 * each, "base": 100 * MIB, "peak": (100 + peak) * MIB, "anonymous_base": 0,
         "anonymous_peak": peak * MIB, "load": 1.5, "threads": 1}
        for each in cpu
    ]  # fmt: skip
    told: dict[str, Any] = {"subject": "m512", "task": "wanda", "quality": GOOD, "versions": {tool: "1.0"}}
    return Line(tool=tool, runs=runs, date="2026-11-26", cpu="a CPU", **told | changes)


@pytest.mark.slow
def test_the_measurement_counts_the_work_and_its_memory_and_not_what_came_before() -> None:
    code = (
        "import importlib.util, json, sys, time\n"
        f"spec = importlib.util.spec_from_file_location('job', {str(JOB)!r})\n"
        "job = importlib.util.module_from_spec(spec); spec.loader.exec_module(job)\n"
        "before = bytearray(40 << 20); spent = time.process_time()\n"
        "while time.process_time() - spent < 0.3: pass\n"
        "def work():\n"
        "    began = time.process_time(); held = bytearray(60 << 20)\n"
        "    while time.process_time() - began < 0.2: pass\n"
        "print(json.dumps(job.measured(work)))\n"
    )
    found = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert 0.19 <= found["cpu"] < 0.5  # 0.2, and what a busy machine adds; with what came before it is over 0.5
    assert found["wall"] >= 0.19
    assert 59 * MIB <= found["peak"] - found["base"] < 64 * MIB  # a kernel counts pages lazily
    assert 58 * MIB <= found["anonymous_peak"] - found["anonymous_base"] < 64 * MIB
    assert found["base"] > 40 * MIB


def test_the_runner_imports_nothing_of_ours_for_another_tool(tmp_path: Path) -> None:
    for module in (*job.TOOLS["modelopt"][1], job.LLAMA, "safetensors.torch", "torch", "torch.nothing"):
        at = tmp_path / "path" / Path(*module.split("."))
        at.mkdir(parents=True, exist_ok=True)
        for folder in (at, *at.parents):
            if folder != tmp_path / "path" and folder.is_relative_to(tmp_path / "path"):
                (folder / "__init__.py").touch()
    stub = "def sparsify(model, how, config):\n    raise SystemExit(f'{how} {sorted(sys.modules)}')\nimport sys\n"
    (tmp_path / "path/modelopt/torch/sparsity/__init__.py").write_text(stub)
    (tmp_path / "path/safetensors/torch/__init__.py").write_text("load_file = lambda path: {'windows': []}\n")
    (tmp_path / "path/transformers/__init__.py").write_text(
        "class AutoTokenizer:\n    from_pretrained = lambda *a, **k: None\nAutoModelForCausalLM = AutoTokenizer\n"
    )
    (tmp_path / "path/torch/__init__.py").write_text("set_num_threads = get_num_threads = lambda *a: 1\n")
    written = tmp_path / "job.json"
    written.write_text(json.dumps({"tool": "modelopt", "task": "sparsegpt", "model": "m", "ids": "i", "out": "o"}))
    environment = {"PYTHONPATH": str(tmp_path / "path"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, JOB, written], capture_output=True, text=True, env=environment)
    assert done.stderr.startswith("sparsegpt ")
    assert "'compress" not in done.stderr


def test_the_layer_error_is_that_of_the_outputs_on_dense_inputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 8)
            self.first, self.second = nn.Linear(8, 6, bias=False), nn.Linear(6, 5, bias=False)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            return self.second(self.first(self.embed(input_ids)))

    torch.manual_seed(0)
    dense, changed = Model(), Model()
    ids_NT = torch.randint(7, (3, 4))
    found = layer_errors(dense.requires_grad_(False), changed.requires_grad_(False), ids_NT)
    x_TI = dense.embed(ids_NT).flatten(0, 1)
    y_TI = dense.first(x_TI)  # not what the changed model gives the second map
    for name, inputs in (("first", x_TI), ("second", y_TI)):
        want, got = (getattr(m, name).weight.double() for m in (dense, changed))
        error = ((got - want) @ inputs.double().T).norm() / (want @ inputs.double().T).norm()
        assert found[name] == pytest.approx(float(error), rel=1e-5)


@pytest.mark.parametrize(("form", "less"), [("gptq", 1), ("gptq_v2", 0)])
def test_the_layout_of_gptq_is_read_as_it_is_packed(tmp_path: Path, form: str, less: int) -> None:
    w_OI = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    stored = Grid(bits=4, group=8).quantize(w_OI)
    zero_OG = torch.as_tensor(stored.zero).clamp(min=1)
    want_OI = replace(stored, zero=zero_OG).dense()
    tensors = {
        "a.qweight": to_words(stored.codes, 4).T, "a.qzeros": to_words((zero_OG - less).T.contiguous(), 4),
        "a.scales": stored.scale.T, "a.g_idx": torch.arange(32, dtype=torch.int32) // 8, "b.weight": w_OI,
    }  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    told = {"quant_method": "gptq", "bits": 4, "checkpoint_format": form}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": told}))
    found = decoded_gptq(Checkpoint(tmp_path))
    assert torch.equal(found["a.weight"], want_OI)
    assert torch.equal(found["b.weight"], w_OI)


def test_three_of_four_is_no_two_of_four() -> None:
    assert two_of_four(torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]]))
    assert not two_of_four(torch.tensor([[1.0, 0, 2, 0, 1, 0, 2, 3]]))


def test_the_table_says_medians_ranges_and_ratios_to_ours(tmp_path: Path) -> None:
    append(tmp_path / "lines.jsonl", line("ours", [99.0], 1))  # a later line of the same job counts instead
    for each in (line("tool", [8.0], 50), line("ours", [1.0, 4.0, 2.0], 20)):
        append(tmp_path / "lines.jsonl", each)
    text = document(read(tmp_path / "lines.jsonl"))
    assert "| Wanda 2:4 | ours | 2.0 (1.0-4.0) | 1 | 4.0 (2.0-8.0) | 20 (20-20) | 1 |" in text
    assert "| Wanda 2:4 | tool | 8.0 | 4.00 | 16.0 | 50 | 2.50 |" in text
    assert "2:4 holds" in text


def test_a_broken_pattern_is_told() -> None:
    bad = replace(line("tool", [1.0], 1), quality=replace(GOOD, two_of_four=False, rest=False))
    text = document([bad])
    assert "tool: 2:4 does not hold." in text
    assert "more than the blocks' matrices changed" in text
    assert "2:4 holds" not in text


def test_the_windows_handed_over_are_the_text_of_the_random_model(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(subjects, "VOCABULARY", 16)
    monkeypatch.setattr(subjects, "make_random", tiny)
    subject = subjects.prepared("m512", tmp_path)
    from safetensors.torch import load_file

    windows = load_file(subject.ids)["windows"]
    words = [int(word[1:]) for word in (tmp_path / "m512.txt").read_text().split()]
    rows = torch.tensor(words[: subjects.SAMPLES * subjects.LENGTH]).view(subjects.SAMPLES, -1)
    assert sorted(windows.tolist()) == sorted(rows.tolist())
    assert not {tuple(row) for row in subject.judged_NT.tolist()} & {tuple(row) for row in rows.tolist()}


def tiny(model: Path, dtype: torch.dtype) -> None:
    """A tokenizer of one word a token, as `make_random` writes it beside its model."""
    subjects.word_tokenizer(16).save_pretrained(model)


def test_a_python_without_a_tool_is_refused_in_one_line(tmp_path: Path, capsys: Any) -> None:
    asked = ["--out", str(tmp_path), "--subjects", "m512", "--tools", "gptqmodel"]
    assert main([*asked, "--peers-python", sys.executable]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "has no gptqmodel" in said
    assert main([*asked, "--peers-python", str(tmp_path / "nowhere")]) == 2
    assert "does not run; `make bench-peers` makes one" in capsys.readouterr().err


def test_no_lines_no_tables(tmp_path: Path, capsys: Any) -> None:
    assert main(["--markdown", str(tmp_path / "none.jsonl")]) == 2
    assert "holds no lines" in capsys.readouterr().err
