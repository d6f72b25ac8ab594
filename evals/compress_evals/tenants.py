"""Benchmarks serving eight fine-tunes of the built-in model: mixed batches against dense models in turn, and memory.

`python -m compress_evals.tenants` makes a fine-tune (the built-in model with a random change to all blocks and norms, 5
percent of the magnitude of each), stores its delta with each codec, and loads that delta eight times, as eight tenants.
The baseline is eight dense models in memory, each of which computes its own rows. Both compute the same rows,
alternating in one process on one thread, and the ratio of the medians is reported. `adapters` are LoRA adapters, of the
low-rank delta, over the model compressed by COMPRESSED; the baseline is then eight such models with an adapter attached
to each. A random change says nothing about quality, so none is reported.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compress
from compress.adapters.attach import attach
from compress.codecs import recipes_of
from compress.export import export
from compress.tenants import load_tenants

CODECS = {"1-bit signs": ("bitdelta", 1.0), "low rank": ("lowrank", 1.0), "2:4 int4": ("deltazip", 3.0),
          "delta-come": ("delta-come", 1.0), "adapters": ("lowrank", 1.0)}  # fmt: skip
COMPRESSED = "gptq-int4"
TENANTS = 8
CONTEXT = 32  # tokens of context before decoding, and of a prompt
CHANGE = 0.05
FEW = compress.Calibration(samples=16, length=128)


@dataclass(frozen=True)
class Row:
    """One codec; times are median milliseconds of a decode step and of a 32-token prompt, with one row per tenant."""

    codec: str
    delta_bytes: int
    share: float  # of the bytes in memory of the fine-tune as a model of its own
    resident_bytes: int  # of all tenants, beyond the base
    resident_growth: float  # resident / stored bytes
    decode_alone: float
    decode_mixed: float
    prompt_alone: float
    prompt_mixed: float

    @property
    def decode(self) -> float:
        """The throughput of mixed batches over that of dense models in sequence, when decoding."""
        return self.decode_alone / self.decode_mixed

    @property
    def prompt(self) -> float:
        """The same ratio for prompts."""
        return self.prompt_alone / self.prompt_mixed


def fine_tune(out: Path) -> Path:
    """Write the built-in model with a random change to everything except its tied embeddings."""
    from transformers import AutoTokenizer

    model = compress.load("builtin")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name:
                change = torch.randn(parameter.shape, generator=generator) * parameter.float().pow(2).mean().sqrt()
                parameter.add_((change * CHANGE).to(parameter.dtype))
    model.save_pretrained(out)
    from compress.model.source import locate

    AutoTokenizer.from_pretrained(locate("builtin"), local_files_only=True).save_pretrained(out)
    return out


def decoding(forward: Callable[..., Any], rows: int) -> Callable[[], None]:
    """A function that decodes one more token for `rows` rows at each call, after a random context."""
    out = forward(torch.randint(4, 4000, (rows, CONTEXT)), None)
    token, cache = torch.full((rows, 1), 7), [out.past_key_values]

    def step() -> None:
        cache[0] = forward(token, cache[0]).past_key_values

    return step


def milliseconds(work: Callable[[], Any]) -> float:
    """The wall time of `work` in milliseconds."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def in_turns(first: Callable[[], Any], second: Callable[[], Any], runs: int) -> tuple[float, float]:
    """The median milliseconds of two functions, run alternately after one warm-up each."""
    first(), second()
    times = [(milliseconds(first), milliseconds(second)) for _ in range(runs)]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)


def subjects(codec: str, delta: Path) -> tuple[Any, Path | str, Path]:
    """The fine-tune as a model of its own, its base, and the folder from which it is served."""
    if codec != "adapters":
        return compress.load(delta, base="builtin"), "builtin", delta
    small = compress.run("builtin", COMPRESSED, delta.with_name("small")).out
    adapter = export(delta, "peft", delta.with_name("adapter")).out
    attached = attach(small, adapter, delta.with_name("attached")).out
    return compress.load(attached), small, adapter


def measured(codec: str, fine_tuned: Any, base: Path | str, folder: Path, runs: int) -> Row:
    """Measure one codec, from the fine-tune as a model of its own, its base, and the folder of its delta or adapter."""
    models = [fine_tuned, *(copy.deepcopy(fine_tuned) for _ in range(TENANTS - 1))]
    names = [f"tenant-{n}" for n in range(TENANTS)]
    tenants = load_tenants(base, dict.fromkeys(names, folder))
    before = tenants.nbytes()
    prompts = torch.randint(4, 4000, (TENANTS, CONTEXT))
    with torch.inference_mode():
        tenants(prompts, names)

        def alone(model: Any) -> Callable[[Tensor, Any], Any]:
            return lambda ids, cache: model(input_ids=ids, past_key_values=cache, use_cache=True)

        steps = [decoding(alone(model), 1) for model in models]
        mixed = decoding(lambda ids, cache: tenants(ids, names, past_key_values=cache, use_cache=True), TENANTS)
        decode = in_turns(lambda: [step() for step in steps], mixed, runs)
        pairs = list(zip(models, prompts.split(1), strict=True))
        prompt = in_turns(
            lambda: [model(input_ids=ids) for model, ids in pairs], lambda: tenants(prompts, names), max(3, runs // 4)
        )
    stored = tenants.entries[names[0]].difference.nbytes
    grown = tenants.nbytes() - before
    whole = sum(t.nbytes for t in (*fine_tuned.parameters(), *fine_tuned.buffers()))
    return Row(codec, stored, stored / whole, grown, grown / (TENANTS * stored), *decode, *prompt)


def table(rows: list[Row]) -> str:
    """The rows as a text table."""
    both = f"{'alone':>7}{'mixed':>8} {'ratio':>6}"
    head = f"{'codec':<12} {'bytes':>9} {'share':>6} {'memory':>7} {both} {both}"
    lines = [
        f"{r.codec:<12} {r.delta_bytes:>9,} {r.share:>6.3f} {r.resident_growth:>7.3f} "
        f"{r.decode_alone:>7.1f}{r.decode_mixed:>8.1f} {r.decode:>6.2f} "
        f"{r.prompt_alone:>7.1f}{r.prompt_mixed:>8.1f} {r.prompt:>6.2f}"
        for r in rows
    ]
    told = (
        f"{TENANTS} tenants, one row each; {torch.get_num_threads()} thread; medians of alternating runs; memory is\n"
    )
    told += (
        "resident / stored bytes; ms of a decode step, then of prompts: one dense model after another, one mixed batch"
    )
    return "\n".join([told, head, *lines])


def main() -> None:
    """Parse the arguments, measure each codec, and print the table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--codecs", nargs="*", default=list(CODECS), choices=list(CODECS))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tuned = fine_tune(Path(folder) / "tuned")
        for codec in asked.codecs:
            delta = compress.Delta(base="builtin", embeddings="base", others="base" if codec == "adapters" else "own")
            recipe = compress.Recipe(passes=recipes_of(*CODECS[codec])[0], calibration=FEW, delta=delta)
            out = compress.run(tuned, recipe, Path(folder) / codec.replace(":", "of").replace(" ", "-")).out
            rows.append(measured(codec, *subjects(codec, out), asked.runs))
    text = json.dumps([{**asdict(r), "decode": r.decode, "prompt": r.prompt} for r in rows], indent=1)
    sys.stdout.write((text if asked.json else table(rows)) + "\n")


if __name__ == "__main__":
    main()
