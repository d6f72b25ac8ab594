"""`python -m compress_evals.likelihoods`: the cost of logits for whole prompts, and for the scored tokens alone.

lm-eval computes them for whole prompts (`whole`); `Scorer` computes only those at the end that are read (`end`).
A random model with the shapes of SmolLM2-135M (49,152 tokens) in bf16 scores continuations of 1 to 7 tokens after
prompts of a given mean length. The two ways alternate, each run in a process of its own, and both give the same sums.
The table shows the CPU seconds of the scoring alone and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any

SHAPES: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
WAYS = ("whole", "end")


def scored(way: str, length: int, count: int, batch: int, shapes: dict[str, Any] = SHAPES) -> dict[str, float]:
    """CPU seconds of the scoring, peak resident memory of this process in MB, and the sum of all log-likelihoods."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from compress.model.source import locate
    from compress_evals.folders import tokenizer_of
    from compress_evals.quiet import quiet
    from compress_evals.scorer import Scorer

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shapes)).to(torch.bfloat16).eval()
    with quiet():
        scorer = Scorer(model, tokenizer_of(locate("builtin")), batch)
    if way == "whole":
        scorer._options = None
    draw = random.Random(0)
    asked = [(None, tokens(draw, length * 2 // 3, length * 4 // 3, shapes), tokens(draw, 1, 7, shapes))
             for _ in range(count)]  # fmt: skip
    began = time.process_time()
    found = scorer._loglikelihood_tokens(asked, disable_tqdm=True, override_bs=batch)
    return {
        "seconds": time.process_time() - began,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "sum": sum(likelihood for likelihood, _ in found),
    }


def tokens(draw: random.Random, least: int, most: int, shapes: dict[str, Any]) -> list[int]:
    """Random tokens, from `least` to `most` of them."""
    return [draw.randrange(1, shapes["vocab_size"]) for _ in range(draw.randint(least, most))]


def main() -> None:
    """Parse the arguments, run both ways in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, nargs="+", default=[60, 400], help="average tokens per prompt")
    parser.add_argument("--count", type=int, default=64, help="number of requests")
    parser.add_argument("--batch", type=int, default=32, help="requests per batch")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way is not None:
        sys.stdout.write(json.dumps(scored(given.way, given.length[0], given.count, given.batch)) + "\n")
        return
    sys.stdout.write(
        "| prompt, tokens | logits | processor seconds (range) | peak, MB | sum |\n|---|---|---|---|---|\n"
    )
    for length in given.length:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(given.runs):
            for way in WAYS:
                found[way].append(apart(way, length, given.count, given.batch))
        for way, runs in found.items():
            seconds, peak = ([run[key] for run in runs] for key in ("seconds", "peak"))
            spread = f"{median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
            sums = ", ".join(sorted({f"{run['sum']:.6f}" for run in runs}))
            sys.stdout.write(f"| {length} | {way} | {spread} | {median(peak):,.0f} | {sums} |\n")


def apart(way: str, length: int, count: int, batch: int) -> dict[str, float]:
    """`scored` in a process of its own."""
    command = [sys.executable, "-m", "compress_evals.likelihoods", "--way", way, "--length", str(length)]
    command += ["--count", str(count), "--batch", str(batch)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {key: float(value) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}


if __name__ == "__main__":
    main()
