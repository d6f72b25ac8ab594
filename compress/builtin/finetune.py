"""Fine-tune the built-in model: `python -m compress.builtin.finetune --ability facts --out DIR`.

It makes a real fine-tune for testing deltas: all matrices of the blocks and all norms are trained, the tied embedding
only with --embeddings. Part of every batch is documents of the kinds that the base was trained on, so that it keeps
what it knew. Exit code 5 if a gate is missed. About two minutes on one CPU core; the same seed, thread count and
machine give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.builtin.abilities import ABILITIES, Ability, ability
from compress.builtin.documents import (
    Question,
    closed_book,
    context_document,
    fact_document,
    in_context,
    open_book_document,
    task_document,
)
from compress.builtin.facts import TIERS, facts
from compress.builtin.gates import exact_match
from compress.builtin.train import LENGTH

BASE = Path(__file__).parent / "weights"
KEPT = 0.9  # the share of the base's trained facts that the fine-tune must still answer
REPLAY = {"fact": 0.6, "context": 0.25, "open": 0.08, "task": 0.07}
IGNORED = -100  # the label that cross_entropy ignores
WARMUP = 20
STEPS = {"facts": 450, "arithmetic": 450}
RATES = {"facts": 5e-4, "arithmetic": 1e-3}

Document = tuple[str, str]  # a prompt, and the continuation to be learned


def replay(rng: random.Random) -> Document:
    """A document of the kinds that the base was trained on, except plain text."""
    known = facts()
    match rng.choices(list(REPLAY), list(REPLAY.values()))[0]:
        case "fact":
            text = fact_document(rng, rng.choices(known, [TIERS[fact.tier] for fact in known])[0])
        case "context":
            text = context_document(rng, 8)
        case "open":
            text = open_book_document(rng, known)
        case _:
            text = task_document(rng, rng.choice(["copy", "summary", "format"]))
    return "", text


def packed(documents: Callable[[], Document], tokenizer: Any) -> tuple[list[int], list[int]]:
    """LENGTH + 1 ids of documents end to end, each beginning with BOS, and labels in which prompts are ignored."""
    ids: list[int] = []
    labels: list[int] = []
    while len(ids) <= LENGTH:
        prompt, rest = (tokenizer(part, add_special_tokens=False).input_ids for part in documents())
        ids += [tokenizer.bos_token_id, *prompt, *rest]
        labels += [IGNORED if prompt else tokenizer.bos_token_id, *[IGNORED] * len(prompt), *rest]
    return ids[: LENGTH + 1], labels[: LENGTH + 1]


def batch(task: Ability, rng: random.Random, tokenizer: Any, rows: int, replayed: int) -> tuple[Tensor, Tensor]:
    """Ids and labels [rows, LENGTH + 1]; `replayed` of the rows hold documents of the base's kinds."""
    own = [packed(lambda: replay(rng), tokenizer) for _ in range(replayed)]
    new = [packed(lambda: task.document(rng), tokenizer) for _ in range(rows - replayed)]
    ids, labels = zip(*own, *new, strict=True)
    return torch.tensor(ids), torch.tensor(labels)


def train(model: Any, tokenizer: Any, task: Ability, arguments: argparse.Namespace) -> None:
    """Train for the whole schedule: AdamW without weight decay, a short warm-up, then linear decay to zero."""
    rng = random.Random(arguments.seed)
    model.get_input_embeddings().weight.requires_grad_(arguments.embeddings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rule = torch.optim.AdamW(trained, betas=(0.9, 0.97), weight_decay=0.0, fused=True)
    model.train()
    for step in range(arguments.steps):
        for group in rule.param_groups:
            group["lr"] = arguments.rate * min((step + 1) / WARMUP, 1 - step / arguments.steps)
        ids_BT, labels_BT = batch(task, rng, tokenizer, arguments.rows, arguments.replayed)
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        rule.step()
        rule.zero_grad()
    model.eval()


def right(model: Any, tokenizer: Any, questions: Sequence[Question]) -> float:
    """The share of questions that are answered correctly."""
    answers = exact_match(model, tokenizer, questions)
    return sum(answers) / len(answers)


def scores(model: Any, tokenizer: Any, task: Ability) -> dict[str, float]:
    """The scores on the ability's questions, on the base's trained facts, and on reading a context of 3 facts."""
    asked = closed_book(facts("evaluation"), "trained")
    return {
        "own": right(model, tokenizer, task.questions),
        "base trained": right(model, tokenizer, asked),
        "base context3": right(model, tokenizer, in_context(3, 200)),
    }


def difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Any]:
    """How large the differences D of the blocks' matrices are, and how flat their spectra.

    `norm` is ||D|| / ||W|| over all matrices, then the smallest and largest of a single one; `energy` is the share of
    ||D||^2 in the leading 1/32, 1/16 and 1/8 of the singular values, averaged over matrices; `exponent` is p of the
    power law s_i ~ i^-p fitted to the first half of them, averaged.
    """
    pairs = {n: (w.float(), after[n].float() - w.float()) for n, w in before.items() if ".layers." in n and w.ndim == 2}
    ratios = [float(d.norm() / w.norm()) for w, d in pairs.values()]
    whole = sum(float(d.square().sum()) for _, d in pairs.values()) / sum(
        float(w.square().sum()) for w, _ in pairs.values()
    )
    spectra = [torch.linalg.svdvals(d) for _, d in pairs.values()]
    shares = {
        f"1/{part}": sum(float(s[: len(s) // part].square().sum() / s.square().sum()) for s in spectra) / len(spectra)
        for part in (32, 16, 8)
    }
    exponent = sum(map(falling, spectra)) / len(spectra)
    return {"norm": [whole**0.5, min(ratios), max(ratios)], "energy": shares, "exponent": exponent}


def falling(values_R: Tensor) -> float:
    """The exponent p of s_i ~ i^-p, by least squares on logarithms over the first half of the values."""
    y = values_R[: len(values_R) // 2].double().log()
    x = torch.arange(1, len(y) + 1, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float(-(x @ y) / (x @ x))


def finetune(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, save an ordinary model folder in bfloat16 with `finetune.json`, and return the content of that file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True, dtype=torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    task = ability(arguments.ability, arguments.seed)
    began = time.monotonic()
    train(model, tokenizer, task, arguments)
    seconds = time.monotonic() - began
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, arguments.out / name)
    saved = AutoModelForCausalLM.from_pretrained(arguments.out, local_files_only=True, dtype="auto")
    options = {name: value for name, value in vars(arguments).items() if name != "out"}
    found = scores(saved, tokenizer, task)
    report = {
        **options,
        "seconds": round(seconds),
        "scores": found,
        "missed": missed(found, task),
        "difference": difference(before, saved.state_dict()),
    }
    (arguments.out / "finetune.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def missed(found: Mapping[str, float], task: Ability) -> list[str]:
    """The gates that are missed, one readable line each."""
    gates = {"own": task.gate, "base trained": KEPT}
    return [f"{name} {found[name]:.3f} < {floor}" for name, floor in gates.items() if found[name] < floor]


def main() -> int:
    """Parse the options, train and check the gates; returns 0 if all are met, else 5."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ability", choices=sorted(ABILITIES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the documents, and of the facts that `facts` teaches"
    )
    parser.add_argument("--steps", type=int, help=f"default {STEPS}")
    parser.add_argument("--rate", type=float, help=f"default {RATES}")
    parser.add_argument("--rows", type=int, default=4, help=f"windows of {LENGTH} tokens per step")
    parser.add_argument("--replayed", type=int, help="share of the rows that are the base's own documents")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--embeddings", action="store_true", help="train the tied embedding too")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or STEPS[arguments.ability]
    arguments.rate = arguments.rate or RATES[arguments.ability]
    arguments.replayed = arguments.rows // 2 if arguments.replayed is None else arguments.replayed
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = finetune(arguments)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 5 if report["missed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
