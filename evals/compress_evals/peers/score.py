"""Evaluates the model that a tool wrote, from its folder and in the same way for all tools.

Each folder is decoded to plain matrices, and all forward passes are in float32. The error of a linear layer is
|(W' - W) X| / |W X|, where X are its inputs in the dense model, on tokens that no tool was calibrated on. KL is
KL(dense || changed) of the next-token distributions, with all decoded matrices in place. Shape suffixes: N windows,
T tokens, O out, I in.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ArtifactError
from compress.export.words import from_words
from compress.model.source import Checkpoint
from compress.sources import open_source

BITS = 4
AT_ONCE = 4096  # tokens per forward pass


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Mean and largest error of the blocks' linear layers, KL in nats per token, and the share of zero weights in them.

    `two_of_four` says whether every group of four neighbouring weights has at least two zeros, `rest` whether all other
    tensors equal those of the dense model. `scores` are the shares of right answers, empty for a random model.
    """

    error: float
    worst: float
    kl: float
    zeros: float
    two_of_four: bool
    rest: bool
    scores: dict[str, float]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, or of its only model subfolder, decoded; raises ArtifactError for an unknown format."""
    inner = sorted(folder.glob("*/config.json"))  # AutoRound writes into a subfolder
    folder = inner[0].parent if len(inner) == 1 and not (folder / "config.json").exists() else folder
    plain = Checkpoint(folder)
    if (plain.config.get("quantization_config") or {}).get("quant_method") == "gptq":
        return decoded_gptq(plain)
    source = open_source(folder, dequantize=True)
    return {name: source.tensor(name) for name in source.names()}


def decoded_gptq(folder: Checkpoint) -> dict[str, Tensor]:
    """The decoded tensors of a checkpoint in GPTQ's layout, version 1 (which stores zero points minus one) or 2.

    Raises ArtifactError unless it has 4 bits. Source: `pack` of AutoGPTQ and GPT-QModel.
    """
    told = folder.config["quantization_config"]
    if told["bits"] != BITS:
        raise ArtifactError(f"{folder.path}: {told['bits']} bits, {BITS} are read")
    less = 0 if told.get("checkpoint_format") == "gptq_v2" else 1
    found: dict[str, Tensor] = {}
    for name in folder.names():
        stem, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            part = {key: folder.stored_tensor(f"{stem}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx")}
            group_I = part["g_idx"].long()
            codes_OI = from_words(part["qweight"].T.contiguous(), BITS)
            zero_GO = from_words(part["qzeros"], BITS) + less
            scale_GO = part["scales"].float()
            found[f"{stem}.weight"] = (codes_OI - zero_GO[group_I].T) * scale_GO[group_I].T
        elif leaf not in ("qzeros", "scales", "g_idx"):
            found[name] = folder.stored_tensor(name)
    return found


def in_place(dense: Any, tensors: dict[str, Tensor]) -> Any:
    """A copy of the dense model with its tensors replaced; raises ArtifactError if a tensor is missing or unexpected.

    An output head that is tied to the embedding may be missing.
    """
    model = deepcopy(dense)
    told = model.load_state_dict({name: t.to(dense.dtype) for name, t in tensors.items()}, strict=False)
    missing = [n for n in told.missing_keys if not (n == "lm_head.weight" and dense.config.tie_word_embeddings)]
    if missing or told.unexpected_keys:
        raise ArtifactError(f"tensors differ from the dense model's: {[*missing, *told.unexpected_keys][0]}")
    return model


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


@torch.inference_mode()
def layer_errors(dense: nn.Module, changed: nn.Module, judged_NT: Tensor) -> dict[str, float]:
    """|(W' - W) X| / |W X| of each linear layer, where X are its inputs in the dense model.

    Products are float32, sums float64.
    """
    others = linears(changed)
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in others}
    hooks = []
    for name, linear in linears(dense).items():
        own_OI = linear.weight.float()
        change_OI = others[name].weight.float() - own_OI

        def look(_: Any, args: tuple[Tensor, ...], name: str = name, pair: Any = (change_OI, own_OI)) -> None:
            x_TI = args[0].float()
            sums[name] += torch.stack([(x_TI @ w_OI.T).square().sum(dtype=torch.float64) for w_OI in pair])

        hooks.append(linear.register_forward_pre_hook(look))
    for ids_BT in judged_NT.split(max(1, AT_ONCE // judged_NT.shape[1])):
        dense(input_ids=ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: float((pair[0] / pair[1]).sqrt()) for name, pair in sums.items()}


@torch.inference_mode()
def mean_kl(dense: Any, changed: Any, judged_NT: Tensor) -> float:
    """KL(dense || changed), in nats per token."""
    total = 0.0
    for ids_BT in judged_NT.split(max(1, AT_ONCE // judged_NT.shape[1])):
        p, q = (m(input_ids=ids_BT, use_cache=False).logits.float().log_softmax(-1) for m in (dense, changed))
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return total / judged_NT.numel()


def two_of_four(w_OI: Tensor) -> bool:
    """Whether every group of four neighbouring weights of a row has at least two zeros."""
    return bool(((w_OI == 0).unflatten(1, (-1, 4)).sum(-1) >= 2).all())


def quality(dense: Any, changed: Any, judged_NT: Tensor, scores: dict[str, float]) -> Quality:
    """All quality measures of a model against its dense original."""
    errors = layer_errors(dense, changed, judged_NT)
    weights = [linear.weight for linear in linears(changed).values()]
    before, after = dense.state_dict(), changed.state_dict()
    others = [name for name in before if name.removesuffix(".weight") not in errors]
    return Quality(
        error=sum(errors.values()) / len(errors),
        worst=max(errors.values()),
        kl=mean_kl(dense, changed, judged_NT),
        zeros=sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights),
        two_of_four=all(two_of_four(w) for w in weights),
        rest=all(torch.equal(before[name], after[name]) for name in others),
        scores=scores,
    )
