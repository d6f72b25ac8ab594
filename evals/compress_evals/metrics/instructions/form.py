"""Checks of formatting: placeholders, a postscript, bullets, a title, sections, JSON."""

from __future__ import annotations

import json
import re

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FENCE = re.compile(r"^```(?:json|Json|JSON)?|```$")


def number_placeholders(response: str, *, num_placeholders: int) -> bool:
    """Whether there are at least `num_placeholders` placeholders in square brackets."""
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def postscript(response: str, *, postscript_marker: str) -> bool:
    """Whether there is a postscript with that marker, in any case; `P.S.` and `P.P.S` may contain spaces."""
    marker = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(postscript_marker, re.escape(postscript_marker))
    return re.search(marker, response, re.IGNORECASE) is not None


def constrained_response(response: str) -> bool:
    """Whether one of the three allowed answers is in the response."""
    return any(option in response for option in OPTIONS)


def number_bullet_lists(response: str, *, num_bullets: int) -> bool:
    """Whether exactly `num_bullets` lines begin with `-` or with a single `*`."""
    return len(re.findall(r"^\s*(?:\*[^*]|-).*$", response, re.MULTILINE)) == num_bullets


def number_highlighted_sections(response: str, *, num_highlights: int) -> bool:
    """Whether there are at least `num_highlights` `*highlights*` or `**highlights**` that are not empty."""
    single = re.findall(r"\*([^\n*]*)\*", response)
    double = re.findall(r"\*\*([^\n*]*)\*\*", response)
    return sum(bool(text.strip()) for text in (*single, *double)) >= num_highlights


def multiple_sections(response: str, *, section_spliter: str, num_sections: int) -> bool:
    """Whether there are at least `num_sections` sections that begin with the marker and a number."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", response)) >= num_sections


def json_format(response: str) -> bool:
    """Whether the whole response is JSON, with or without a Markdown fence."""
    text = response.strip()
    try:
        json.loads(_FENCE.sub("", text).strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    """Whether there is a title in double angle brackets, on one line and not empty."""
    return any(found.strip("<> \t") for found in re.findall(r"<<[^\n]+>>", response))
