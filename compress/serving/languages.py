"""Loads the tokenizers and chat templates of fine-tunes whose files differ from the base's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer

from compress.artifact import Artifact
from compress.errors import ArtifactError, first_line
from compress.model.source import VOCABULARIES, locate, read_json
from compress.serving.app import Language
from compress.writer import copy_companions, copy_shared, is_companion, write_json


def own_languages(base: Path, deltas: Mapping[str, Path], tokenizer: object) -> dict[str, Language]:
    """The languages of the fine-tunes that differ from their base in a file other than the weights.

    `tokenizer` is the base's; fine-tunes without a tokenizer of their own use it. Raises ArtifactError for a tokenizer
    that cannot be loaded.
    """
    found: dict[str, Language] = {}
    for name, given in deltas.items():
        delta = Artifact(locate(given), base)
        if not any(map(is_companion, delta.provenance["files"])):
            continue
        with TemporaryDirectory() as made:  # a tokenizer is loaded from one folder, but a delta omits the base's files
            beside = Path(made)
            copy_shared(delta, beside)
            copy_companions(delta.path, beside)
            write_json(beside / "config.json", {k: v for k, v in delta.config.items() if k != "quantization_config"})
            speaks = any((beside / name).is_file() for name in VOCABULARIES)
            own = tokenizer_of(beside, delta.path) if speaks else tokenizer
            settings = beside / "generation_config.json"
            told = read_json(settings, "the generation config") if settings.is_file() else delta.config
        found[name] = Language.of(own, told.get("eos_token_id"))
    return found


def tokenizer_of(folder: Path, told: Path | None = None) -> object:
    """The tokenizer in a model folder; raises ArtifactError, naming `told` or the folder, if it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds of error for a damaged folder
        raise ArtifactError(f"{told or folder}: its tokenizer cannot be loaded: {first_line(error)[:200]}") from error
