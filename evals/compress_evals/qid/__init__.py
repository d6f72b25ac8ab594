"""Predicts what quantization will cost a model, from its size and the number of tokens it was trained on.

Not here: measuring models, except for the small sweep of `__main__.py`, on which the laws can be refitted. A prediction
complements measured results; it never replaces one.
"""

from __future__ import annotations

from compress_evals.qid.fit import Comparison, Fit, fit, refit
from compress_evals.qid.law import PUBLISHED, Law, Prediction, predict
from compress_evals.qid.points import Point, read_points

__all__ = ["PUBLISHED", "Comparison", "Fit", "Law", "Point", "Prediction", "fit", "predict", "read_points", "refit"]
