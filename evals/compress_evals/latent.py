"""`python -m compress_evals.latent`: measures what it costs and saves to cache latents instead of keys and values.

Every row is compared with the dense model and its plain cache, so it shows the losses of the factored projections and
of the cache together. The table compares `transmla`, which caches one latent, with `svd-llm` on keys and values
separately, which caches two latents of half the size, and with quantized caches of the dense model. Text is fed as in
`compress_evals.kv`. Then greedy generation is timed, alternating between the plain and the latent cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import DynamicCache

import compress
from compress import KV
from compress.plan import usable
from compress.recipe import from_dict
from compress.runtime.kv import QuantizedCache, maker
from compress_evals.folders import model_name
from compress_evals.kv import Bench, Make, Row, table

SITES = "*.[kv]_proj"
CALIBRATION = {"data": "mixed", "samples": 128, "length": 256, "seed": 0}
PROMPT, NEW, RUNS = 64, 192, 5  # prompt tokens, generated tokens, timed pairs


def removed(rank: int, rows: int, columns: int) -> float:
    """The share of a matrix's parameters that factors of this rank save; above 0 if the factors are smaller."""
    return 1 - rank * (rows + columns) / (rows * columns)


def variants(kept: float, rows: int, columns: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and passes that keep this share of a token's key and value, which have `rows` numbers each.

    The `svd-llm` variant is left out if its factors would not be smaller than the matrices.
    """
    yield f"one latent (transmla), {kept:.1%}", {"transmla": {"kept": kept}}
    apart = removed(round(kept * rows), rows, columns)
    if apart > 0:
        yield f"two latents (svd-llm), {kept:.1%}", {"svd-llm": {"sites": SITES, "removed": apart}}


def compressed(model: str, step: dict[str, Any], out: Path) -> Path:
    """The artifact folder of a recipe with one pass."""
    return compress.run(model, from_dict({"passes": [step], "calibration": CALIBRATION}), out, force=True).out


@torch.inference_mode()
def seconds(model: Any, make: Make) -> float:
    """Seconds to greedily generate a fixed number of tokens through one cache, batch 1."""
    words = model.config.get_text_config(decoder=True).vocab_size
    ids_BT = torch.randint(words, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(model.device)
    began = time.monotonic()
    model.generate(ids_BT, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, past_key_values=make())
    return time.monotonic() - began


def speed(name: str, model: Any, latent: Make) -> str:
    """A table row: median tokens per second of both caches, and the median and range of the ratios of the pairs."""
    plain = partial(DynamicCache, config=model.config)
    seconds(model, latent)
    pairs = [(seconds(model, plain), seconds(model, latent)) for _ in range(RUNS)]
    ours, theirs = (NEW / statistics.median(pair[i] for pair in pairs) for i in (1, 0))
    ratios = sorted(pair[0] / pair[1] for pair in pairs)
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    return f"| {name} | {theirs:.0f} | {ours:.0f} | {spread} |"


def measured(bench: Bench, arguments: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """The rows of all caches, and the speed rows of the `transmla` ones."""
    config = bench.model.config
    rows, speeds = [bench.measure("dense, plain", partial(DynamicCache, config=config))], []
    shape = next(m.weight.shape for n, m in bench.model.named_modules() if n.endswith("k_proj"))
    for bits in arguments.bits:
        make = partial(QuantizedCache, config, **asdict(KV(bits=bits, residual=32)))
        rows.append(bench.measure(f"dense, {bits} bits, R 32", make))
    with TemporaryDirectory() as folder:
        for kept in arguments.kept:
            for name, step in variants(kept, *shape):
                sys.stderr.write(f"{name}\n")
                made = compressed(arguments.model, step, Path(folder) / "made")
                model = compress.load(made, kv=None).to(usable(arguments.device))
                latent = maker(model, "latent")
                rows.append(bench.measure(name, latent, model))
                if "transmla" in step:
                    speeds.append(speed(name, model, latent))
    return rows, speeds


def main() -> None:
    """Measure every kind of cache and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin", help="a dense model's folder")
    parser.add_argument("--kept", type=float, nargs="+", default=[1, 0.75, 0.5, 0.375, 0.25])
    parser.add_argument("--bits", type=int, nargs="+", choices=(8, 4, 2), default=[8, 4, 2])
    parser.add_argument("--chunk", type=int, default=8, help="tokens fed per step")
    parser.add_argument("--questions", type=int, default=400, help="questions per task")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    bench = Bench(arguments.model, arguments.chunk, arguments.questions, arguments.device)
    rows, speeds = measured(bench, arguments)
    tokens = sum(len(window.ids) - 1 for window in bench.texts)
    conditions = f"{model_name(arguments.model)}, {tokens} tokens of prose, {arguments.questions} questions per "
    conditions += f"task, {arguments.chunk} tokens per step, {arguments.device}; 95 % intervals"
    head = f"| {PROMPT} + {NEW} tokens | plain, tokens/s | latent, tokens/s | latent / plain |\n|---|---|---|---|"
    lines = "\n".join([f"medians of {RUNS} pairs of runs after one to warm up, batch 1 (range)", "", head, *speeds])
    sys.stdout.write(f"{conditions}\n\n{table(rows, bench.length)}\n\n{lines}\n")


if __name__ == "__main__":
    main()
