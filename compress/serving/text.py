"""Decodes a growing list of tokens to text: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer decodes an incomplete character to


class Text:
    """The text of a growing list of tokens, returned in pieces that will not change.

    `before` are the last tokens of the text that it continues: decoders drop the space at the beginning of a text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self.tokenizer, self.stops, self.before = tokenizer, tuple(stops), list(before)
        self.tokens: list[int] = []
        # Tokens before `start` are not decoded again; the text of those before `told` is in `held` or was returned.
        self.start = self.told = 0
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token and return the text that has become final; sets `stopped` if it ends at a stop string."""
        self.tokens.append(token)
        return self._take(self._decoded(final=False))

    def finish(self) -> str:
        """Return the text that was held back, at the end of a sequence."""
        if self.stopped:
            return ""
        rest = self._take(self._decoded(final=True))
        rest, self.held = rest + ("" if self.stopped else self.held), ""
        return rest

    def _decoded(self, final: bool) -> str:
        """The text of tokens not decoded before; empty while it ends in an incomplete character, unless `final`."""
        context = [] if self.start else self.before
        before = self._decode(context + self.tokens[self.start : self.told])
        now = self._decode(context + self.tokens[self.start :])
        if len(now) <= len(before) or (now.endswith(UNFINISHED) and not final):
            return ""
        self.start, self.told = self.told, len(self.tokens)
        return now[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""

    def _take(self, new: str) -> str:
        """The part of the held and the new text that is final; what may be the beginning of a stop string is held."""
        text = self.held + new
        ends = [found for stop in self.stops if (found := text.find(stop)) >= 0]
        if ends:
            self.stopped, self.held = True, ""
            return text[: min(ends)]
        keep = max((overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
