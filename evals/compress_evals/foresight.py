"""Compares the bytes, peak memory and seconds that `compress plan` predicts with those of actual runs.

`python -m compress_evals.foresight` makes random Llama models of several widths, and plans and runs each recipe on
them, each in a process of its own. The predicted seconds are compared with wall time less the import time, because a
plan leaves that out. A plan assumes an idle machine, so this must run on one; on a busy machine, use one thread and
compare processor seconds (`--cpu`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import torch

from compress.recipe import load, packaged
from compress_evals.streaming import SHAPE, block_bytes, make

RECIPES = ("rtn-int4", "magnitude-50", "wanda-50", "wanda-2of4", "sparsegpt-50", "gptq-int4", "wanda-2of4-gptq-int4",
           "svd-llm-20")  # fmt: skip
VOCABULARY = 4096  # entries: somewhat more than the built-in model's tokenizer has
LOADED = "import compress.driver, transformers.models.llama.modeling_llama"


@dataclass(frozen=True, kw_only=True)
class Ran:
    """Wall seconds, processor seconds and peak resident bytes of a process, and its stdout."""

    seconds: float
    cpu: float
    peak: int
    said: str


def ran(*line: str) -> Ran:
    """Run the Python interpreter with these arguments; raises SystemExit with its exit code if it fails."""
    with TemporaryFile("w+", encoding="utf-8") as said:
        child = subprocess.Popen([sys.executable, *line], stdout=said)
        began = time.monotonic()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(child.returncode)
        said.seek(0)
        took = time.monotonic() - began
        return Ran(
            seconds=took, cpu=usage.ru_utime + usage.ru_stime, peak=usage.ru_maxrss * 1024, said=said.read()
        )  # fmt: skip


def model_of(folder: Path, width: int, blocks: int) -> Path:
    """The folder of a random Llama of this width, which is made if it does not exist."""
    model = folder / f"llama-{width}x{blocks}"
    inner = -(-width * 8 // 3 // 128) * 128
    shape = SHAPE | {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": inner,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 64,
    }  # fmt: skip
    if not model.is_dir():
        make(model, 4 * VOCABULARY * width + blocks * block_bytes(shape), shape=shape)
    return model


def changes(recipe: str, samples: int, steps: int | None) -> list[str]:
    """The `--set` arguments for a recipe: its calibration windows, and the steps of the passes that learn a block."""
    learns = [i for i, step in enumerate(load(recipe).passes) if "held_out" in step.options()]
    sets = [f"calibration.samples={samples}", *(f"passes.{i}.steps={steps}" for i in learns if steps is not None)]
    return [part for change in sets for part in ("--set", change)]


def compared(model: Path, recipe: str, sets: list[str], out: Path, importing: float, cpu: bool) -> str:
    """A table row that compares plan and run of one recipe on one model."""
    asked = (recipe, "--model", str(model), *sets)
    plan = json.loads(ran("-m", "compress", "plan", *asked, "--json").said)
    done = ran("-m", "compress", "run", *asked, "--out", str(out), "--force", "--json")
    held = json.loads((out / "compress.json").read_text(encoding="utf-8"))["sizes"]["bytes"]
    foreseen, seconds = plan["needs"]["memory"]["bytes"], sum(plan["seconds"].values())
    taken = (done.cpu if cpu else done.seconds) - importing
    exact = "yes" if held == plan["bytes"] else f"off by {held - plan['bytes']:+,}"
    return (
        f"| {model.name.removeprefix('llama-')} | {recipe} | {exact} | {foreseen / 1e6:.0f} | {done.peak / 1e6:.0f} | "
        f"{100 * (foreseen / done.peak - 1):+.1f} % | {seconds:.1f} | {taken:.1f} | {seconds / taken:.2f} |"
    )


def main() -> None:
    """Make the models, plan and run each recipe, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows, of the length in the recipes")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="by name; `all` for every packaged one")
    parser.add_argument("--steps", type=int, help="steps of passes that learn a block; default: the recipe's")
    parser.add_argument("--cpu", action="store_true", help="compare processor seconds instead of wall seconds")
    parser.add_argument("--dir", type=Path, default=Path("out/bench/foresight"), help="folder for models and results")
    arguments = parser.parse_args()
    loads = [ran("-c", LOADED) for _ in range(3)]
    importing = min(load.cpu if arguments.cpu else load.seconds for load in loads)
    recipes = list(packaged()) if arguments.recipes == ["all"] else arguments.recipes
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; bfloat16, "
        f"{arguments.blocks} blocks, {arguments.samples} windows; one run each; importing takes {importing:.1f} s\n\n"
        "| width x blocks | recipe | bytes exact | memory foreseen, MB | measured, MB | off by | time foreseen, s | "
        "measured, s | ratio |\n|---|---|---|---|---|---|---|---|---|"
    )
    for width in arguments.widths:
        model = model_of(arguments.dir, width, arguments.blocks)
        for recipe in recipes:
            sets = changes(recipe, arguments.samples, arguments.steps)
            print(compared(model, recipe, sets, arguments.dir / "out", importing, arguments.cpu), flush=True)


if __name__ == "__main__":
    main()
