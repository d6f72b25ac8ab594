"""`python -m compress_evals.recovery`: how much of the loss a LoRA adapter, trained on a compressed model, regains.

Each recipe is run on the built-in model, and its result is measured in three forms: unchanged; with a low-rank
correction of the same rank that needs no training (`repair`); and with an adapter attached that PEFT has trained to
match the dense model's distributions (KL) on calibration windows other than the recipe's. Needs the package peft.
Shape suffixes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compress
from compress import Calibration, Repair
from compress.adapters.attach import attach
from compress.adapters.training import trainable
from compress.calibration import draw
from compress.recipe import load, packaged
from compress_evals.bench import Measured, of, of_dense, table
from compress_evals.folders import evaluate_folders, tokenizer_of

RECIPES = ("wanda-2of4-gptq-int4", "gptq-int2")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNED = Calibration(data="mixed", samples=512, length=256, seed=1)
BATCH = 8  # windows per step


def windows() -> Tensor:
    """The token ids [N, T] that adapters are trained on."""
    from compress.model.source import locate

    (ids_NT,) = draw(LEARNED, tokenizer_of(locate("builtin")), LEARNED.length or 0).windows
    return ids_NT


def divergence(dense: Any, model: Any, ids_NT: Tensor) -> Tensor:
    """The mean KL divergence of a model from the dense one over all tokens, in nats; gradients flow to the model."""
    with torch.no_grad():
        wanted_NTV = dense(input_ids=ids_NT).logits.float().log_softmax(-1)
    got_NTV = model(input_ids=ids_NT).logits.float().log_softmax(-1)
    loss: Tensor = (wanted_NTV.exp() * (wanted_NTV - got_NTV)).sum(-1).mean()
    return loss


def train(folder: Path, out: Path, rank: int, steps: int, rate: float) -> float:
    """Train an adapter on the artifact in `folder` and save it in `out`; returns the seconds that the steps took."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    options = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(compress.load(folder), trainable(options))
    dense, ids_NT = compress.load("builtin"), windows()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    began = time.perf_counter()
    for _ in range(steps):
        loss = divergence(dense, model, ids_NT[torch.randint(len(ids_NT), (BATCH,))])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    model.save_pretrained(out)
    return seconds


def measure(name: str, rank: int, steps: int, rate: float, out: Path) -> list[Measured]:
    """The results of the dense model, and of the three forms of a recipe's result."""
    recipe = load(packaged()[name])
    plain, repaired, recovered = (out / f"{name}{end}" for end in ("", f"-repair{rank}", f"-lora{rank}"))
    compress.run("builtin", recipe, plain, force=True)
    compress.run("builtin", replace(recipe, passes=(*recipe.passes, Repair(rank=rank))), repaired, force=True)
    seconds = train(plain, out / f"{name}-adapter", rank, steps, rate)
    sys.stderr.write(f"{name}: {steps} steps in {seconds:.0f} s\n")
    attach(plain, out / f"{name}-adapter", recovered, force=True)
    dense, *found = evaluate_folders([plain, repaired, recovered], "builtin")
    return [of_dense(dense, found[0], "builtin"), *(of(result, dense, "builtin") for result in found)]


def main() -> None:
    """Parse the arguments, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(packaged()))
    parser.add_argument("--rank", type=int, default=8, help="of the adapter and of the correction without training")
    parser.add_argument("--steps", type=int, default=300, help=f"of AdamW, {BATCH} windows each")
    parser.add_argument("--rate", type=float, default=2e-3, help="initial learning rate, falling to 0 as a cosine")
    parser.add_argument("--out", type=Path, default=Path("out/recovery"))
    arguments = parser.parse_args()
    rows: list[Measured] = []
    for name in arguments.recipes:
        found = measure(name, arguments.rank, arguments.steps, arguments.rate, arguments.out)
        rows += found if not rows else found[1:]
    told = f"rank {arguments.rank}, {arguments.steps} steps of {BATCH} x {LEARNED.length} tokens"
    sys.stdout.write(f"builtin, cpu, {torch.get_num_threads()} threads, {told}, scores in %\n{table(rows)}\n")


if __name__ == "__main__":
    main()
