"""What quantization will cost a model, predicted from its size and the tokens it was trained on.

Not here: any measurement of a model but the small sweep of `__main__.py`, which the laws are refitted on. A prediction
stands beside measured results; it never replaces one.
"""

from __future__ import annotations

from compress_evals.qid.fit import Comparison, Fit, fit, refit
from compress_evals.qid.law import PUBLISHED, Law, Prediction, predict
from compress_evals.qid.points import Point, read_points

__all__ = ["PUBLISHED", "Comparison", "Fit", "Law", "Point", "Prediction", "fit", "predict", "read_points", "refit"]
