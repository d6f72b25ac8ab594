"""Building the model of a config without weights, with transformers' own class; no code in the folder is executed."""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from compress.errors import ArtifactError, in_short, pass_on_memory

# the order matters: a class that several of these map to is taken from the first
AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForMaskedLM",
        "AutoModelForSequenceClassification", "AutoModel")  # fmt: skip
REPEATED = re.compile(r"(^|_)(layers?|blocks?|depths?)$")  # fields of a config that are numbers of modules
FREE = re.compile(r"theta|token|seed|param|length")  # fields of a config that are not sizes
MODULES = 1 << 10  # numbers of modules up to this,
ENTRIES = 1 << 24  # and sizes up to this are always allowed, however few tensors there are
CHOSEN_HERE = ("attn_implementation", "experts_implementation")  # these can name a kernel repository to fetch code from


def auto_class(config: Any) -> Any:
    """The Auto class of transformers that builds the class named in the config's `architectures`.

    If none does, the first in AUTO that knows the config; AutoModelForCausalLM if none knows it.
    """
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
    """A config as transformers reads it: old field names replaced by new ones, missing fields set to defaults."""
    from transformers import AutoConfig, PreTrainedConfig

    plain = {key: value for key, value in without_code(dict(config)).items() if key != "quantization_config"}
    # transformers writes infinity as {"__float__": "Infinity"}
    return AutoConfig.for_model(**PreTrainedConfig._decode_special_floats(plain))


def skeleton(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model of a config, with its parameters on the meta device and real buffers.

    Raises ArtifactError for an encoder-decoder, or for a config that transformers cannot build.
    """
    if config.get("is_encoder_decoder"):
        raise ArtifactError(
            f"config.json: {config.get('model_type')} is an encoder-decoder; only models with one stack of blocks are "
            "supported"
        )
    try:  # transformers raises many types for wrong values; none of them is a bug in Compress
        with without_collection(), without_weights():
            read = parsed(config)
            model = auto_class(read).from_config(read, dtype=dtype, experts_implementation="eager")
    except Exception as error:
        pass_on_memory(error)
        raise ArtifactError(f"config.json: transformers cannot build this model: {in_short(error, 240)}") from error
    if not isinstance(model, nn.Module):
        raise ArtifactError("config.json: not a language model")
    model.tie_weights()  # type: ignore[operator]
    return model.eval().requires_grad_(False)


@contextmanager
def without_collection() -> Iterator[None]:
    """Pause the garbage collector, which takes a fifth of the time to import a model's module for the first time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def without_weights() -> Iterator[None]:
    """Models that are built here have their parameters on the meta device, where nothing initializes them.

    Their buffers are real and initialized. Initializing parameters without values took half of the time to build one.
    """

    def emptied(_module: nn.Module, _name: str, param: nn.Parameter | None) -> nn.Parameter | None:
        if param is None:
            return None
        empty = param if param.is_meta else nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves such parameters alone
        return empty

    hook = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]  # declared without a result
    try:
        yield
    finally:
        hook.remove()


def check_sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ArtifactError for a number in a config that is too large for tensors of these shapes.

    This is checked first, because building a model costs time for every block and memory for its buffers before any
    shape can be compared.
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
            raise ArtifactError(
                f"config.json: {name} is {value}, but its {len(shapes)} tensors allow at most {limit:,}"
            )


def without_code(config: Any) -> Any:
    """A config without the fields that can make transformers run foreign code: custom classes, kernel repositories."""
    if isinstance(config, list):
        return [without_code(value) for value in config]
    if not isinstance(config, dict):
        return config
    names = {"auto_map", *CHOSEN_HERE, *(f"_{name}" for name in CHOSEN_HERE)}
    return {
        k: without_code(v) for k, v in config.items() if k not in names and not k.endswith("implementation_internal")
    }


def run(module: Any, ids_BT: torch.Tensor) -> Any:
    """Call a model on token ids, with its key-value cache disabled if it has that option."""
    takes = inspect.signature(module.forward).parameters
    cached = "use_cache" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
    return module(input_ids=ids_BT, **({"use_cache": False} if cached else {}))


def ignored(model: Any, name: str) -> bool:
    """Whether the architecture declares that it ignores this tensor of the file, such as a draft head or old buffer."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)
