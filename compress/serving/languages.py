"""Loads the tokenizers and chat templates of fine-tunes whose files differ from the base's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from compress.adapters.lora import is_adapter
from compress.artifact import Artifact
from compress.errors import ArtifactError, first_line
from compress.model.source import VOCABULARIES, locate, read_json
from compress.serving.app import Language
from compress.writer import copy_companions, copy_shared, is_companion, write_json

GENERATION = "generation_config.json"
SPOKEN = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", GENERATION)


def own_languages(base: Path, deltas: Mapping[str, Path], tokenizer: object) -> dict[str, Language]:
    """The languages of the fine-tunes that differ from their base in a file other than the weights.

    `tokenizer` is the base's; fine-tunes without a tokenizer of their own use it. Raises ArtifactError for a tokenizer
    that cannot be loaded.
    """
    found: dict[str, Language] = {}
    for name, given in deltas.items():
        with TemporaryDirectory() as made:  # a tokenizer is loaded from one folder, but a delta omits the base's files
            beside = Path(made)
            config = gathered(given, base, beside)
            if config is None:
                continue
            write_json(beside / "config.json", {k: v for k, v in config.items() if k != "quantization_config"})
            speaks = any((beside / name).is_file() for name in VOCABULARIES)
            own = tokenizer_of(beside, given) if speaks else tokenizer
            settings = beside / GENERATION
            told = read_json(settings, "the generation config") if settings.is_file() else config
        found[name] = Language.of(own, told.get("eos_token_id"))
    return found


def gathered(given: Path, base: Path, into: Path) -> dict[str, Any] | None:
    """Copy the tokenizer and its companions of a delta or an adapter, and those it shares with its base, into a folder.

    Returns the configuration of its model, or None if the fine-tune has no such file of its own.
    """
    given = given.expanduser()
    if is_adapter(given):
        if not any((given / name).is_file() for name in SPOKEN):
            return None
        copy_companions(base, into)
        if any((given / name).is_file() for name in VOCABULARIES):  # then nothing of the base's tokenizer is meant
            for file in [file for file in into.iterdir() if file.name != GENERATION]:
                file.unlink()
        copy_companions(given, into)
        return read_json(base / "config.json", "the configuration")
    delta = Artifact(locate(given), base)
    if not any(map(is_companion, delta.provenance["files"])):
        return None
    copy_shared(delta, into)
    copy_companions(delta.path, into)
    return delta.config


def tokenizer_of(folder: Path, told: Path | None = None) -> object:
    """The tokenizer in a model folder; raises ArtifactError, naming `told` or the folder, if it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds of error for a damaged folder
        raise ArtifactError(f"{told or folder}: its tokenizer cannot be loaded: {first_line(error)[:200]}") from error
