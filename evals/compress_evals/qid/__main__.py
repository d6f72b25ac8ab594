"""`python -m compress_evals.qid MODEL=TOKENS ...`: measures a small sweep of GPTQ on which to refit the laws.

Each model is quantized to each number of bits, with one scale per row and in groups, and its cross-entropy on the
built-in unseen prose is compared with the dense model's. TOKENS is the number of tokens that the model was trained on.
Prints a table, and writes `rows.jsonl`, which `compress qid --fit` reads.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import compress
from compress import GPTQ, Calibration, Recipe
from compress.model.source import locate
from compress.survey import survey
from compress_evals.fidelity import compare_windows, evaluation_text, text_windows
from compress_evals.folders import opened

CALIBRATION = Calibration(data="mixed", samples=128, length=256, seed=0)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One quantized model; losses are in nats per token of the evaluation text."""

    model: str
    method: str
    bits: int
    group: int
    bits_per_weight: float
    parameters: int
    tokens: float
    dense_loss: float
    loss: float
    degradation: float


def measure(model: str, tokens: float, bits: Sequence[int], groups: Sequence[int]) -> list[Measured]:
    """Quantize one model with GPTQ at each number of bits and group size, in a temporary folder, and measure it."""
    parameters = survey(locate(model))["non_embedding"]
    dense, tokenizer = opened(locate(model), "cpu")
    windows = text_windows(tokenizer, evaluation_text(), 256)
    rows = []
    for group in groups:
        for width in bits:
            sys.stderr.write(f"{model}: {width} bits, group {group}\n")
            recipe = Recipe(passes=(GPTQ(bits=width, group=group),), calibration=CALIBRATION)
            with tempfile.TemporaryDirectory() as folder:
                report = compress.run(model, recipe, Path(folder) / "out")
                found = compare_windows(dense, opened(report.out, "cpu")[0], windows)
            count = sum(len(f.kl) for f in found)
            before, after = (
                sum(float(losses.sum()) for losses in pair) / count
                for pair in ([f.dense_loss for f in found], [f.compressed_loss for f in found])
            )
            rows.append(
                Measured(
                    model=Path(model).name, method="gptq", bits=width, group=group, parameters=parameters,
                    bits_per_weight=report.bits_per_weight, tokens=tokens, dense_loss=before, loss=after,
                    degradation=after - before,
                )
            )  # fmt: skip
    return rows


def table(rows: Sequence[Measured]) -> str:
    """A Markdown table of the degradation by bits, with one line per model and group size."""
    widths = sorted({row.bits for row in rows})
    lines = [
        "| model | tokens | group | " + " | ".join(f"{w} bits" for w in widths) + " |",
        "|---" * (3 + len(widths)) + "|",
    ]
    for model, group in dict.fromkeys((row.model, row.group) for row in rows):
        same = {row.bits: row for row in rows if (row.model, row.group) == (model, group)}
        cells = [f"{same[w].degradation:.4f} ({same[w].bits_per_weight:.2f})" for w in widths]
        some = next(iter(same.values()))
        lines.append(f"| {model} | {some.tokens:.3g} | {group or 'row'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trained(text: str) -> tuple[str, float]:
    """Parse MODEL=TOKENS into a pair; raises ValueError if TOKENS is not a number."""
    model, _, tokens = text.rpartition("=")
    return model, float(tokens)


def main() -> None:
    """Measure, write the rows, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=trained, default=[("builtin", 10e6)], metavar="MODEL=TOKENS")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--groups", nargs="+", type=int, default=[0, 64])
    parser.add_argument("--out", type=Path, default=Path("out/qid"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "rows.jsonl"
    rows = [
        row for model, tokens in arguments.models for row in measure(model, tokens, arguments.bits, arguments.groups)
    ]
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    head = f"nats a token lost on {len(evaluation_text()):,} characters of unseen prose, bits a weight in brackets"
    sys.stdout.write(f"{head}\n{table(rows)}\nrefit: compress qid --fit {path}\n")


if __name__ == "__main__":
    main()
