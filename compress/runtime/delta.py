"""A delta beside its base as an ordinary model in memory: nothing of ours stays in it."""

from __future__ import annotations

from typing import Any

from compress.artifact import Artifact
from compress.errors import ArtifactError
from compress.model.architecture import skeleton

GENERATION = "generation_config.json"


def fine_tuned(delta: Artifact, options: dict[str, Any]) -> Any:
    """The transformers model that a delta read with its base denotes; `options` go to `from_pretrained`.

    Its tensors are decoded one by one; memory is that of one model.
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
