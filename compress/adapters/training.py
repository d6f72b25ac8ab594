"""Lets PEFT train a LoRA adapter on a compressed model, to regain what compression lost.

PEFT wraps only the layers it knows. `trainable` tells a configuration how to wrap compressed ones; it must be called
again when an adapter is loaded, because PEFT does not save this. The compressed weights stay frozen. An adapter is not
merged into them, which would undo the compression; `attach` stores it beside them instead.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

from compress.errors import RecipeError, UnsupportedWeight
from compress.runtime.linear import CompressedLinear


def trainable(config: Any) -> Any:
    """Return the given `LoraConfig` of PEFT, which now also wraps the layers of a model from `compress.load`.

    Use it in `get_peft_model(model, trainable(LoraConfig(...)))`, and in `PeftModel.from_pretrained(model, folder,
    config=trainable(PeftConfig.from_pretrained(folder)))`. Raises UnsupportedWeight for DoRA, whose magnitudes need the
    dense weight at every step, RecipeError for `target_modules="all-linear"`, which matches no compressed layer.
    """
    if getattr(config, "target_modules", None) == "all-linear":
        raise RecipeError("target_modules: 'all-linear' does not match compressed layers; name them, such as q_proj")
    if getattr(config, "use_dora", False):
        raise UnsupportedWeight("use_dora: needs every compressed weight decoded at every step; use plain LoRA")
    config._register_custom_module({CompressedLinear: layer()})  # PEFT's documented, if private, way
    return config


@cache
def layer() -> type:
    """The module that PEFT puts around a compressed layer."""
    from peft.tuners.lora import Linear

    class LoraBesideCompressed(Linear):  # type: ignore[misc]
        """A frozen compressed layer plus scale * B A; it cannot be merged."""

        def __init__(self, *args: Any, **options: Any) -> None:
            with warnings.catch_warnings():  # PEFT warns about a type of layer it does not know, but finds its sizes
                warnings.filterwarnings("ignore", "Unsupported layer type")
                super().__init__(*args, **options)

        def merge(self, *_: Any, **__: Any) -> None:
            """Raise UnsupportedWeight."""
            raise UnsupportedWeight(
                "an adapter cannot be merged into a compressed weight; save the adapter and use `compress attach`"
            )

    return LoraBesideCompressed
