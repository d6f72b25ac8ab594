"""Measure how much of a dense model's knowledge its compressed version kept, and how certain the difference is.

Not here: any model or data; the built-in questions come from `compress.builtin`. lm-eval is imported only when
something is evaluated.
"""

from __future__ import annotations

from compress_evals.comparison import accept, compare
from compress_evals.fidelity import Fidelity, measure_fidelity
from compress_evals.folders import evaluate_folders, fidelity_line
from compress_evals.report import TableRow, html, markdown, table_rows
from compress_evals.results import Comparison, Results, load, save
from compress_evals.run import evaluate
from compress_evals.stats import Paired, paired, verdict_text

__all__ = [
    "Comparison",
    "Fidelity",
    "Paired",
    "Results",
    "TableRow",
    "accept",
    "compare",
    "evaluate",
    "evaluate_folders",
    "fidelity_line",
    "html",
    "load",
    "markdown",
    "measure_fidelity",
    "paired",
    "save",
    "table_rows",
    "verdict_text",
]
