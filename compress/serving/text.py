"""From tokens to text as it grows: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


class Text:
    """The text of a growing list of tokens, handed out in pieces that are final."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.tokens: list[int] = []
        self.start = self.told = 0  # tokens decoded again for their context; tokens whose text is in `held` or out
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is final now; sets `stopped` if it ends at a stop string."""
        self.tokens.append(token)
        return self._take(self._decoded(final=False))

    def finish(self) -> str:
        """The text that was held back."""
        if self.stopped:
            return ""
        rest = self._take(self._decoded(final=True))
        rest, self.held = rest + ("" if self.stopped else self.held), ""
        return rest

    def _decoded(self, final: bool) -> str:
        """The text of new tokens, if it ends with a whole character."""
        before = self._decode(self.tokens[self.start : self.told])
        now = self._decode(self.tokens[self.start :])
        if len(now) <= len(before) or (now.endswith(UNFINISHED) and not final):
            return ""
        self.start, self.told = self.told, len(self.tokens)
        return now[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""

    def _take(self, new: str) -> str:
        """What of the held text and the new is final."""
        text = self.held + new
        ends = [found for stop in self.stops if (found := text.find(stop)) >= 0]
        if ends:
            self.stopped, self.held = True, ""
            return text[: min(ends)]
        keep = max((overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that a stop string begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
