"""Where a model's blocks are and which modules are linear maps, found by structure rather than by family.

`TESTED` lists the families whose replay, coverage and round trip are covered by this project's tests. Other families
are walked by the same rules, after their replay has been compared with the model itself (`Walk.prove`).
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from compress.errors import UnsupportedWeight

TESTED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "opt", "gpt2", "gptj",
    "gpt_bigcode", "gpt_neox", "falcon", "bloom", "olmo", "olmo2", "olmo3", "stablelm", "starcoder2", "cohere",
    "granite", "smollm3", "mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3",
    "glm4_moe", "granitemoe", "gpt_oss", "llama4_text", "bamba", "gemma3", "llava", "qwen2_vl",
    "qwen3_vl_moe", "bert", "roberta",
)  # fmt: skip

ROUTER = re.compile(
    r"(^|\.)(gate|router|shared_expert_gate)(\.|$)"
)  # of a mixture: mlp.gate, router.layer, shared_expert_gate
STACKS_IN_FIRST = ("Llama4TextExperts",)  # classes that keep [experts, in, out] but have no `is_transposed`


def find_blocks(model: Any, count: int) -> tuple[str, nn.ModuleList]:
    """The name and list of the blocks of a model; of a multimodal model, those of its language part.

    Raises UnsupportedWeight if there is no module list of `count` elements.
    """
    text = language_part(model)
    found = [(n, m) for n, m in text.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise UnsupportedWeight(f"no list of {count} blocks in {type(model).__name__}; it is not supported")
    _, blocks = max(found, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return next(name for name, module in model.named_modules() if module is blocks), blocks


def language_part(model: Any) -> Any:
    """The module that turns token ids into hidden states: the decoder of a multimodal model, else the whole model."""
    if getattr(model.config, "text_config", None) is None or not hasattr(model, "get_decoder"):
        return model
    return model.get_decoder()


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map that Compress can replace: `nn.Linear` or transformers' `Conv1D`."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear map keeps its weight as [in, out]: transformers' `Conv1D`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def stacks(module: nn.Module) -> list[str]:
    """The parameters of a module that hold one matrix per expert: [experts, out, in] or [experts, in, out]."""
    count = getattr(module, "num_experts", None)
    named = type(module).__name__.endswith("Experts")
    return [
        name
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and min(p.shape[1:]) > 1 and (named or p.shape[0] == count)
    ]


def stacks_transposed(module: nn.Module) -> bool:
    """Whether the stacks of a module are [experts, in, out]."""
    return bool(getattr(module, "is_transposed", type(module).__name__ in STACKS_IN_FIRST))
