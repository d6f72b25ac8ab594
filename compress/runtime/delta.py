"""A delta beside its base as an ordinary model in memory: nothing of ours stays in it."""

from __future__ import annotations

from pathlib import Path
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
    model = type(empty).from_pretrained(None, config=empty.config, state_dict=state, **options)
    folder = first_with(GENERATION, (delta.path, delta.base.path))
    if folder is not None and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def first_with(name: str, folders: tuple[Path, ...]) -> Path | None:
    """The first of the folders that has a file of this name."""
    return next((folder for folder in folders if (folder / name).is_file()), None)
