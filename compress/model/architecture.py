"""The model of a config, without weights, by the class transformers has for it; nothing in the folder is executed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import nn

from compress.errors import ArtifactError, in_short

# in this order: a class that is in several lists is taken from the first
AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForMaskedLM",
        "AutoModelForSequenceClassification", "AutoModel")  # fmt: skip
REPEATED = re.compile(r"(^|_)(layers?|blocks?|depths?)$")  # what a config counts that becomes modules
FREE = re.compile(r"theta|token|seed|param|length")  # numbers that are no size of anything
MODULES = 1 << 10  # blocks that are built anyway, and
ENTRIES = 1 << 24  # numbers that are taken anyway, however few tensors there are
CHOSEN_HERE = ("attn_implementation", "experts_implementation")  # a name of these may make transformers fetch code


def auto_class(config: Any) -> Any:
    """The Auto class of transformers that builds the class a config names in `architectures`; causal by default."""
    import transformers

    named = (getattr(config, "architectures", None) or [None])[0]
    found = [auto for auto in (getattr(transformers, name, None) for name in AUTO) if auto is not None]
    known = [(auto, auto._model_mapping.get(type(config), None)) for auto in found]
    for auto, kinds in known:
        names = [kind.__name__ for kind in (kinds if isinstance(kinds, (tuple, list)) else (kinds,)) if kind]
        if named in names:
            return auto
    return next((auto for auto, kinds in known if kinds), transformers.AutoModelForCausalLM)


def parsed(config: Mapping[str, Any]) -> Any:
    """A config as transformers reads it: old names by their new ones, what is left out by its default."""
    from transformers import AutoConfig, PreTrainedConfig

    plain = {key: value for key, value in without_code(dict(config)).items() if key != "quantization_config"}
    # it writes infinity as {"__float__": "Infinity"}
    return AutoConfig.for_model(**PreTrainedConfig._decode_special_floats(plain))


def skeleton(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model of a config with parameters on the meta device and buffers real.

    Raises ArtifactError for a config transformers does not know, or an encoder-decoder.
    """
    from accelerate import init_empty_weights

    if config.get("is_encoder_decoder"):
        raise ArtifactError(
            f"config.json: {config.get('model_type')} is an encoder-decoder; only one stack of blocks is walked"
        )
    try:  # transformers raises whatever a wrong value happens to break; none of it is a bug of ours
        read = parsed(config)
        with init_empty_weights(include_buffers=False):
            model = auto_class(read).from_config(read, dtype=dtype, experts_implementation="eager")
    except Exception as error:
        raise ArtifactError(f"config.json: transformers cannot build this model: {in_short(error, 240)}") from error
    if not isinstance(model, nn.Module):
        raise ArtifactError("config.json: not a language model")
    model.tie_weights()  # type: ignore[operator]
    return model.eval().requires_grad_(False)


def check_sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ArtifactError for a number in a config that tensors of these shapes cannot mean.

    Building a model costs time for every block and memory for its tables, before any shape can be compared.
    """
    most = max(ENTRIES, sum(prod(shape) for shape in shapes.values()))
    level: list[tuple[str, Any]] = list(config.items())
    while level:
        name, value = level.pop()
        if isinstance(value, dict):
            level += value.items() if name != "quantization_config" else ()
        elif isinstance(value, list):
            level += [(name, item) for item in value]
        limit = max(MODULES, len(shapes)) if REPEATED.search(name) else most
        if isinstance(value, int) and abs(value) > limit and not FREE.search(name):
            raise ArtifactError(f"config.json: {name} is {value}, its {len(shapes)} tensors allow {limit:,} at most")


def without_code(config: Any) -> Any:
    """A config without what can make transformers run code: its own classes, or kernels named by a repository."""
    if isinstance(config, list):
        return [without_code(value) for value in config]
    if not isinstance(config, dict):
        return config
    names = {"auto_map", *CHOSEN_HERE, *(f"_{name}" for name in CHOSEN_HERE)}
    return {
        k: without_code(v) for k, v in config.items() if k not in names and not k.endswith("implementation_internal")
    }


def run(module: Any, ids_BT: torch.Tensor) -> Any:
    """Call a model on token ids, without a cache where it knows one."""
    takes = inspect.signature(module.forward).parameters
    cached = "use_cache" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
    return module(input_ids=ids_BT, **({"use_cache": False} if cached else {}))


def ignored(model: Any, name: str) -> bool:
    """Whether the architecture says that it leaves this tensor in the file: a draft head, an old buffer."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)
