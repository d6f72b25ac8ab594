"""`python -m compress_evals.matrices`: measures the error of quantizers on each matrix of an otherwise dense model.

Prints two tables. The first gives, by kind of matrix, the ratio of the largest input channels to the median one. The
second gives the relative squared output error tr(D G D') / tr(W G W') of each quantizer as a mean over all matrices,
where W is a weight, D its change, and G the Gram matrix of its inputs in the dense model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import compress
from compress import HQQ, RTN, Calibration, Dense, Quantizer, Recipe, Weight, WeightPass
from compress.stats import Gram

BITS, GROUPS = (2, 3, 4), (32, 64, 128, 0)
QUANTIZERS: dict[str, Any] = {
    "rtn": lambda bits, group: RTN(bits=bits, group=group),
    "rtn search": lambda bits, group: RTN(bits=bits, group=group, search=True),
    "rtn output": lambda bits, group: RTN(bits=bits, group=group, search="output"),
    "hqq": lambda bits, group: HQQ(bits=bits, group=group),
}


@dataclass(frozen=True, kw_only=True)
class Looked:
    """One matrix: its leaf name, its errors, and the largest and 99th percentile input RMS over the median one.

    `errors` are relative squared output errors by quantizer, bits and group.
    """

    leaf: str
    loudest: float
    percentile: float
    errors: dict[tuple[str, int, int], float]

    @classmethod
    def of(cls, site: str, row: Mapping[str, Any]) -> Looked:
        """What `Look` recorded in the ledger of a site."""
        errors = {(name, bits, group): error for name, bits, group, error in row["quantizer_errors"]}
        return cls(leaf=site.rpartition(".")[2], loudest=row["loudest"], percentile=row["percentile"], errors=errors)


@dataclass(frozen=True, kw_only=True)
class Look(WeightPass):
    """A pass that leaves every matrix unchanged and records in the ledger the errors that quantizers would make."""

    requires = (Gram,)

    def rewrite(self, site: Any) -> Weight:
        """Returns the weight unchanged, after recording the errors."""
        gram_II, w_OI = site.stats[Gram], site.original.data.float()
        rms_I = gram_II.diagonal().clamp(min=0).sqrt()
        whole = float(((w_OI @ gram_II) * w_OI).sum())
        errors = []
        for name, make in QUANTIZERS.items():
            for bits in BITS:
                for group in GROUPS:
                    if group == 0 or w_OI.shape[1] % group == 0:
                        step: Quantizer = make(bits, group)
                        change_OI = step.rewrite(site).dense().float() - w_OI
                        error = float(((change_OI @ gram_II) * change_OI).sum()) / whole
                        errors.append([name, bits, group, error])
        middle = float(rms_I.median())
        loudest, percentile = float(rms_I.max()) / middle, float(torch.quantile(rms_I, 0.99)) / middle
        site.ledger |= {"loudest": loudest, "percentile": percentile, "quantizer_errors": errors}
        return Dense(site.original.data)


def loudness(found: Sequence[Looked]) -> str:
    """A Markdown table of the input ratios by kind of matrix, as ranges over the blocks."""
    lines = ["| input of | loudest / median | 99th percentile / median |", "|---|---|---|"]
    for leaf in dict.fromkeys(one.leaf for one in found):
        same = [one for one in found if one.leaf == leaf]
        cells = []
        for values in ([one.loudest for one in same], [one.percentile for one in same]):
            cells.append(f"{min(values):.1f} to {max(values):.1f}")
        lines.append(f"| {leaf} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def losses(found: Sequence[Looked]) -> str:
    """A Markdown table of the relative squared output error, as the mean over all matrices."""
    lines = ["| bits | method | " + " | ".join(f"g{group}" if group else "row" for group in GROUPS) + " |"]
    lines.append("|" + "---|" * (2 + len(GROUPS)))
    for bits in BITS:
        for name in QUANTIZERS:
            cells = []
            for group in GROUPS:
                values = [one.errors[name, bits, group] for one in found if (name, bits, group) in one.errors]
                cells.append(f"{sum(values) / len(values):.4f}" if values else "")
            lines.append(f"| {bits} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(model: str, samples: int, length: int) -> list[Looked]:
    """Every matrix of a model, in the order of the artifact."""
    calibration = Calibration(data="mixed", samples=samples, length=length, seed=0)
    recipe = Recipe(passes=(Look(),), calibration=calibration, ordering="dense")
    with tempfile.TemporaryDirectory() as folder:
        out = compress.run(model, recipe, Path(folder) / "out").out
        made = json.loads((out / "compress.json").read_text(encoding="utf-8"))
    return [Looked.of(site, row) for site, row in made["sites"].items()]


def main() -> None:
    """Measure every matrix of a model and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.samples, arguments.length)
    head = f"{arguments.samples} x {arguments.length} tokens of mixed, cpu, {len(found)} matrices"
    sys.stdout.write("\n".join([head, "", loudness(found), "", losses(found)]) + "\n")


if __name__ == "__main__":
    main()
