"""The divergence between two models' logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def mean_kl(dense: Tensor, compressed: Tensor) -> float:
    """Mean over tokens of KL(dense || compressed) in nats, float32; tokens that dense gives probability 0 count 0."""
    total = 0.0
    for dense_TV, compressed_TV in zip(dense, compressed, strict=True):  # a window at a time: vocabularies are large
        left, right = F.log_softmax(dense_TV.float(), -1), F.log_softmax(compressed_TV.float(), -1)
        each_TV = left.exp() * (left - right)
        total += float(each_TV.masked_fill(left.isneginf(), 0).sum(-1).mean())
    return total / len(dense)
