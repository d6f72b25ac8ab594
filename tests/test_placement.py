"""Tensors are on the right device: commands with a simulated GPU, whose tensors cannot be mixed with CPU tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress_evals.fidelity import evaluation_text
from compress_evals.folders import SHORTEST

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("pretended.py")
TASKS = "facts_trained,facts_mc,facts_context1,facts_generate"  # logits, choices, long prompts, generation
FEW = "calibration: {data: text, samples: 8, length: 32, seed: 0}\n"
PASSES = {
    "masked": "[{wanda: {sparsity: '2:4'}}, {dsnot: {}}, {gptq: {bits: 4, group: 24, target: original}}, repair]",
    "compensated": "[realign, {sparsegpt: {sparsity: 0.5}}, {swaps: {}}, reconstruct]",
    "low rank": "[{oats: {sparsity: 0.5, iterations: 4}}]",
    "rotated": "[quarot, {rtn: {bits: 8, group: 0, inputs: int8}}]",
    "scaled": "[{awq: {steps: 3}}, {rtn: {bits: 4, group: 24, search: output}}]",
    "coded": "[vq]",
    "cut": "[{flap: {}}]",
}


@pytest.fixture(scope="module")
def on_gpu(tiny_llama: Path) -> Callable[[list[list[str]]], dict[str, str]]:
    """`on_gpu(commands)`: what failed of commands with a pretended GPU, and why."""

    def run(commands: list[list[str]]) -> dict[str, str]:
        done = subprocess.run([sys.executable, str(SCRIPT), json.dumps(commands)], capture_output=True, text=True)
        if not done.stdout.strip().endswith("}"):
            pytest.fail(done.stderr)
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run


def test_passes_evaluation_and_deltas_compute_where_they_are_told_to(
    tiny_llama: Path, tmp_path: Path, on_gpu: Callable[[list[list[str]]], dict[str, str]]
) -> None:
    there = ["--device", "cuda:0"]
    commands = []
    for name, passes in PASSES.items():
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(f"model: {tiny_llama}\n{FEW}passes: {passes}\n", encoding="utf-8")
        commands.append(["run", str(recipe), "--out", str(tmp_path / name), *there])
    text = tmp_path / "text.txt"
    text.write_text(evaluation_text()[:SHORTEST], encoding="utf-8")
    few = ["--limit", "4", "--noise", "4", "--tasks", TASKS, "--text", str(text), "--out", str(tmp_path / "eval")]
    commands.append(["eval", str(tmp_path / "masked"), "--base", str(tiny_llama), *few, *there])
    failed = on_gpu(commands)
    assert not failed, "\n".join(f"{command}: {why}" for command, why in failed.items())


def test_the_pretence_refuses_what_a_gpu_refuses() -> None:
    mixed = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, pretended\n"
        "pretended.install()\n"
        "with pretended.everywhere():\n"
        "    here, there = torch.ones(3, 3), torch.ones(3, 3, device='cuda:0')\n"
        "    assert there.is_cuda and (there @ there).sum().item() == 27 and there.cpu().equal(here)\n"
        "    for wrong in (lambda: here @ there, lambda: torch.cat((here, there)), lambda: here[there.long()],\n"
        "                  lambda: there.numpy(), lambda: there.add_(here)):\n"
        "        try:\n"
        "            wrong()\n"
        "        except (RuntimeError, TypeError):\n"
        "            continue\n"
        "        raise SystemExit('was not refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", mixed, str(SCRIPT.parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
