"""What a model folder says of its licence, what in it could run code, and whether it was quantized; nothing runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from compress.model.source import Checkpoint

LARGEST = 256 * 1024  # characters read of a card or a licence
FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
KEYS = ("license", "license_name", "license_link", "base_model", "gated")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
UNKNOWN = "not stated: no licence in the model card, and no LICENSE file"


def licence(folder: Path) -> dict[str, str]:
    """What the card's front matter says, and the first line of each licence file by its name; empty if nothing."""
    found = {key: str(value) for key, value in front_matter(folder / "README.md").items() if key in KEYS}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name.upper().startswith(("LICENSE", "LICENCE")):
            lines = (line.strip() for line in text_of(file).splitlines())
            found[file.name] = next((line for line in lines if line), "empty")[:100]
    return found


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the dashes that open a model card; empty if there is none that can be read."""
    found = FRONT.match(text_of(card).replace("\r\n", "\n")) if card.is_file() else None
    if found is None:
        return {}
    try:
        value = YAML(typ="safe", pure=True).load(found[1]) if not re.search(r"[&*!]\w", found[1]) else None
    except YAMLError:  # a card is prose of anybody; what it does not say is reported as not stated
        return {}
    return {str(key): held for key, held in value.items()} if isinstance(value, dict) else {}


def text_of(file: Path) -> str:
    """The beginning of a text file, damaged characters replaced."""
    with file.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(LARGEST)


def trust(source: Checkpoint) -> list[str]:
    """What a reader should know before the model is run by other programs; empty if there is nothing."""
    folder, config = source.path, source.config
    flags = []
    code = sorted(file.name for file in folder.glob("*.py"))
    if "auto_map" in config:
        flags.append(
            "config.json asks for code of its own (auto_map); it is never run here, and left out of the result"
        )
    if code:
        flags.append(f"holds code: {', '.join(code[:3])}; it is never run, and not copied")
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        flags.append(f"pickled weights lie beside the safetensors: {', '.join(pickled[:3])}; they are not read")
    if source.decoded_from:
        flags.append(f"already quantized ({source.decoded_from}): what that lost stays lost")
    return flags
