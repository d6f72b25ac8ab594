"""`python -m compress_evals.merged`: how much of an adapter comes back from the checkpoint that it was merged into.

A LoRA adapter of the built-in model is trained, merged by PEFT in each dtype, and extracted as a delta by `lora`, which
is not told its rank, by `lowrank` in as many bytes, and by `auto` at one bit. Every model is compared with the base
beside the true adapter. All are run in float32, so that only their weights differ. Needs the package peft.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import compress
from compress import Calibration
from compress.artifact import Artifact
from compress.builtin.abilities import ABILITIES, Ability, ability
from compress.builtin.finetune import train
from compress.builtin.gates import exact_match
from compress.model.source import locate
from compress_evals.deltas import own_windows, write_documents
from compress_evals.fidelity import Window, compare_windows, evaluation_text, text_windows
from compress_evals.folders import tokenizer_of

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LENGTH = 256  # tokens of a window of text
DOCUMENTS = 400  # that `auto` and `lowrank` are calibrated on
SAMPLES = 32


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model: the bytes of its matrices, KL from the true one in nats a token, and the share of questions right."""

    ability: str
    dtype: str
    model: str
    bytes: int
    own_kl: float
    text_kl: float
    right: float
    note: str = ""


class Truth:
    """The base beside the true adapter, in float32, and what the models are compared on."""

    def __init__(self, adapter: Path, task: Ability, limit: int | None) -> None:
        self.tokenizer = tokenizer_of(locate("builtin"))
        self.model = adapted(locate("builtin"), adapter, torch.float32)
        self.questions = task.questions[:limit]
        self.own = own_windows(self.tokenizer, self.questions)
        self.text = text_windows(self.tokenizer, evaluation_text(), LENGTH)

    def measure(self, other: Any, **row: Any) -> Measured:
        """A model's distance from the true one, and its answers."""
        own, text = (self.divergence(other, windows) for windows in (self.own, self.text))
        answers = exact_match(other, self.tokenizer, self.questions)
        return Measured(own_kl=own, text_kl=text, right=sum(answers) / len(answers), **row)

    def divergence(self, other: Any, windows: Sequence[Window]) -> float:
        """The mean KL over the tokens of these windows."""
        found = compare_windows(self.model, other, windows)
        return float(sum(f.kl.sum() for f in found) / sum(len(f.kl) for f in found))


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    """An ordinary model in this dtype."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype).eval()


def adapted(base: Path, adapter: Path, dtype: torch.dtype) -> Any:
    """A model of this dtype with an adapter in float32."""
    from peft import PeftModel

    return PeftModel.from_pretrained(loaded(base, dtype), str(adapter), autocast_adapter_dtype=True).eval()


def trained(task: Ability, out: Path, arguments: argparse.Namespace) -> None:
    """Train an adapter at all linear layers of the built-in model as `compress.builtin.finetune` trains all weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(arguments.seed)
    rank = arguments.rank
    options = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(loaded(locate("builtin"), torch.float32), options)
    train(model, tokenizer_of(locate("builtin")), task, argparse.Namespace(**vars(arguments), embeddings=False))
    model.save_pretrained(out)


def saved(model: Any, out: Path) -> Path:
    """The folder of a plain model with the built-in one's tokenizer."""
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate("builtin") / name, out / name)
    return out


def beside(base: Path, delta: Artifact) -> Any:
    """The base in float32 with the differences of a delta added, which is what a delta computes before any rounding."""
    model = loaded(base, torch.float32)
    with torch.no_grad():
        for site in delta.specs:
            model.get_submodule(site).weight += delta.difference(site).dense().float()
    return model


def bytes_of(delta: Artifact) -> int:
    """The stored bytes of the matrices."""
    return sum(row["bytes"] for row in delta.provenance["sites"].values())


def found_in(rows: Mapping[str, Any]) -> str:
    """The ranks that `lora` found, and the share of the entries that it reproduces."""
    ranks = Counter(row["rank"] for row in rows.values())
    share = sum(row["reproduced"] for row in rows.values()) / len(rows)
    return f"ranks {', '.join(f'{n} x {rank}' for rank, n in sorted(ranks.items()))}; {share:.1%} of entries reproduced"


def compared(name: str, dtype: str, truth: Truth, adapter: Path, data: Path, work: Path) -> Iterator[Measured]:
    """The merged checkpoint in one dtype, and the deltas of it."""
    kind = DTYPES[dtype]
    base = saved(loaded(locate("builtin"), kind), work / "base")
    tuned = saved(adapted(base, adapter, kind).merge_and_unload(), work / "tuned")
    whole = loaded(tuned, torch.float32)
    parameters = sum(p.numel() for n, p in whole.named_parameters() if ".layers." in n and p.ndim == 2)
    common: dict[str, Any] = {"ability": name, "dtype": dtype}
    yield truth.measure(loaded(base, torch.float32), model="base", bytes=0, **common)
    yield truth.measure(whole, model="merged checkpoint", bytes=parameters * kind.itemsize, **common)
    calibration = Calibration(data=str(data), samples=SAMPLES, length=LENGTH)
    bits = 0.0
    for method in ("lora", "lowrank", "auto"):
        out, began = work / method, time.monotonic()
        asked = {"lora": {}, "lowrank": {"bits": bits}, "auto": {"bits": 1.0}}[method]
        compress.extract(tuned, base, out, method=method, calibration=calibration, **asked)
        sys.stderr.write(f"{name}, {dtype}: {method} in {time.monotonic() - began:.0f} s\n")
        delta = Artifact(out, base)
        bits = bits or 8 * bytes_of(delta) / parameters
        note = found_in(delta.provenance["sites"]) if method == "lora" else ""
        row = {**common, "bytes": bytes_of(delta), "note": note}
        yield truth.measure(beside(base, delta), model="auto, 1 bit" if method == "auto" else method, **row)


def table(rows: Sequence[Measured]) -> str:
    """A Markdown table of the rows."""
    lines = ["| adapter of | dtype | model | bytes of matrices | own KL | text KL | own right | |", "|" + "---|" * 8]
    for row in rows:
        figures = f"{row.bytes:,} | {row.own_kl:.2e} | {row.text_kl:.2e} | {100 * row.right:.1f} | {row.note}"
        lines.append(f"| {row.ability} | {row.dtype} | {row.model} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Train, merge, extract, compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--abilities", nargs="+", choices=sorted(ABILITIES), default=["arithmetic"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, default=4, help="windows per step, half of them the base's own documents")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=int, help="questions")
    parser.add_argument("--adapter", type=Path, help="a folder in which trained adapters are kept and looked for")
    arguments = parser.parse_args()
    arguments.replayed = arguments.rows // 2
    rows: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.abilities:
            task = ability(name, arguments.seed)
            adapter = (arguments.adapter or Path(folder)) / f"{name}-{arguments.seed}"
            if not adapter.exists():
                trained(task, adapter, arguments)
            truth = Truth(adapter, task, arguments.limit)
            data = Path(folder) / f"{name}.jsonl"
            write_documents(task, arguments.seed, DOCUMENTS, data)
            for dtype in arguments.dtypes:
                rows += compared(name, dtype, truth, adapter, data, Path(folder) / f"{name}-{dtype}")
    told = f"rank {arguments.rank}, seed {arguments.seed}, {torch.get_num_threads()} threads"
    sys.stdout.write(f"builtin, cpu, {told}; KL in nats a token, answers in %\n{table(rows)}\n")


if __name__ == "__main__":
    main()
