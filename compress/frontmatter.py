"""The YAML front matter of model cards: read from the source's card, and written into ours.

It is read as plain YAML 1.2, without anchors, aliases or tags; front matter that cannot be read counts as absent. Only
printable one-line strings of bounded length are carried over: a longer value is left out, never cut, so that its
meaning cannot change.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

CARD = "README.md"
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
LARGEST = 256 * 1024  # characters of a card that are read
LARGEST_FRONT = 64 * 1024  # characters of front matter; parsing these takes three seconds
DEEPEST = 32  # levels of nesting; evaluation results have a dozen
LONGEST = 500  # characters of a string that is carried over
MOST = 256  # strings in a list; multilingual models name fewer languages
FRONT = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)

Said = Mapping[str, str | list[str]]


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the dashes that open a model card; empty if there is none that can be read."""
    try:
        found = FRONT.match(text_of(card).replace("\r\n", "\n")) if card.is_file() else None
        value = YAML(typ="safe", pure=True).load(found[1]) if found and is_plain(found[1]) else None
    except (OSError, ValueError, YAMLError):  # a card may hold anything
        return {}
    return {str(key): held for key, held in value.items()} if isinstance(value, dict) else {}


def text_of(file: Path) -> str:
    """The first LARGEST characters of a text file; invalid UTF-8 is replaced."""
    with file.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(LARGEST)


def is_plain(text: str) -> bool:
    """Whether YAML is neither too long nor too deeply nested, and has no anchors, aliases or tags."""
    depth = 0
    if len(text) > LARGEST_FRONT:
        return False
    for event in YAML(typ="safe", pure=True).parse(io.StringIO(text)):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        tagged = isinstance(event, (ScalarEvent, CollectionStartEvent)) and event.tag is not None
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None) or tagged or depth > DEEPEST:
            return False
    return True


def carried(folder: Path) -> dict[str, str | list[str]]:
    """What the card of a model folder states about licence, language and use, as far as it can be carried over."""
    said = front_matter(folder / CARD)
    return {key: said[key] for key in CARRIED if is_word(said.get(key)) or is_list(said.get(key))}


def agreed(cards: Iterable[Said]) -> dict[str, str | list[str]]:
    """The entries that all these cards have in common; cards without any entry do not count."""
    first, *others = [card for card in cards if card] or [{}]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def is_word(value: Any) -> bool:
    """Whether a value is a printable one-line string of 1 to LONGEST characters."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST


def is_list(value: Any) -> bool:
    """Whether a value is a list of 1 to MOST such strings."""
    return isinstance(value, list) and 0 < len(value) <= MOST and all(map(is_word, value))


def lines(said: Said) -> list[str]:
    """The front matter as lines of YAML."""
    return [f"{key}: {quoted(value)}" for key, value in said.items()]


def quoted(value: str | list[str]) -> str:
    """A value as JSON, which is valid YAML; `<`, `>`, `&` and backticks are escaped against HTML and Markdown."""
    return json.dumps(value, ensure_ascii=False).translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&`"})
