"""Loads a delta and its base as an ordinary transformers model, which contains no modules of this package."""

from __future__ import annotations

from typing import Any

from compress.artifact import Artifact
from compress.errors import ArtifactError
from compress.model.architecture import skeleton

GENERATION = "generation_config.json"


def fine_tuned(delta: Artifact, options: dict[str, Any]) -> Any:
    """The fine-tuned transformers model that a delta and its base describe; `options` go to `from_pretrained`.

    The tensors are decoded one by one, so that memory peaks at about one model. Raises ArtifactError if the delta was
    opened without its base, or if tensors are missing, unexpected or of the wrong shape.
    """
    from transformers import GenerationConfig

    if delta.base is None:
        raise ArtifactError(f"{delta.path}: is a delta of {delta.pin_name}; give its base")
    empty: Any = skeleton(delta.config, delta.dtype)
    state = {name: delta.tensor(name) for name in delta.names()}
    options = {"dtype": delta.dtype, **options}
    options["output_loading_info"] = True
    model, found = type(empty).from_pretrained(None, config=empty.config, state_dict=state, **options)
    for what in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, found[f"{what}_keys"])):
            raise ArtifactError(f"{delta.path}: {len(keys)} tensors are {what}, first {keys[0]}")
    settings = delta.companion(GENERATION)
    if settings is not None and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(settings.parent, local_files_only=True)
    return model
