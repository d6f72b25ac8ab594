"""What a model card says above its text: read from anybody's, and written into ours.

It is read as plain YAML 1.2, without anchors, aliases or tags; what cannot be read counts as not said. What is carried
over is words that show, in one line and bounded: what does not fit is left out, never cut, so that it says the same.
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
LARGEST = 256 * 1024  # characters read of a card
LARGEST_FRONT = 64 * 1024  # of what stands above its text; they take three seconds
DEEPEST = 32  # levels; results of evaluations have a dozen
LONGEST = 500  # characters of a word that is carried over
MOST = 256  # words in a list; models of all languages name fewer
FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)

Said = Mapping[str, str | list[str]]


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the dashes that open a model card; empty if there is none that can be read."""
    try:
        found = FRONT.match(text_of(card).replace("\r\n", "\n")) if card.is_file() else None
        value = YAML(typ="safe", pure=True).load(found[1]) if found and is_plain(found[1]) else None
    except (OSError, ValueError, YAMLError):  # a card is prose of anybody
        return {}
    return {str(key): held for key, held in value.items()} if isinstance(value, dict) else {}


def text_of(file: Path) -> str:
    """The beginning of a text file, damaged characters replaced."""
    with file.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(LARGEST)


def is_plain(text: str) -> bool:
    """Whether YAML is not too long or nested too deep, and has nothing that refers or is of a type of its own."""
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
    """What the card of a model folder says of licence, language and use, as far as it can be said again."""
    said = front_matter(folder / CARD)
    return {key: said[key] for key in CARRIED if is_word(said.get(key)) or is_list(said.get(key))}


def agreed(cards: Iterable[Said]) -> dict[str, str | list[str]]:
    """What several cards say alike; one that says nothing does not count."""
    first, *others = [card for card in cards if card] or [{}]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def is_word(value: Any) -> bool:
    """Whether a value is text of one line that shows, and not too long."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST


def is_list(value: Any) -> bool:
    """Whether a value is a list of such text."""
    return isinstance(value, list) and 0 < len(value) <= MOST and all(map(is_word, value))


def lines(said: Said) -> list[str]:
    """The lines of YAML that say it."""
    return [f"{key}: {quoted(value)}" for key, value in said.items()]


def quoted(value: str | list[str]) -> str:
    """A value in JSON, which YAML reads too; HTML finds no tags in it, and Markdown no end of a span of code."""
    return json.dumps(value, ensure_ascii=False).translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&`"})
