"""The licence that a model folder states, what in it could run code, and whether it is quantized; nothing is run."""

from __future__ import annotations

from pathlib import Path

from compress.frontmatter import CARD, front_matter, text_of
from compress.model.source import Checkpoint

KEYS = ("license", "license_name", "license_link", "base_model", "gated")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
UNKNOWN = "not stated: no licence in the model card, and no LICENSE file"


def licence(folder: Path) -> dict[str, str]:
    """The licence fields of the card's front matter, and the first line of each licence file by name; may be empty."""
    found = {key: str(value) for key, value in front_matter(folder / CARD).items() if key in KEYS}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name.upper().startswith(("LICENSE", "LICENCE")):
            lines = (line.strip() for line in text_of(file).splitlines())
            found[file.name] = next((line for line in lines if line), "empty")[:100]
    return found


def trust(source: Checkpoint) -> list[str]:
    """What a user should know before other programs run the model, one line each; may be empty."""
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
        flags.append(f"already quantized ({source.decoded_from}): that loss cannot be undone")
    return flags
