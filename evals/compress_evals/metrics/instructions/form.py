"""Marks that a response must show: placeholders, a postscript, bullets, a title, sections, JSON."""

from __future__ import annotations

import json
import re

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FENCE = re.compile(r"^```(?:json|Json|JSON)?|```$")


def number_placeholders(response: str, *, num_placeholders: int) -> bool:
    """At least so many placeholders in square brackets."""
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def postscript(response: str, *, postscript_marker: str) -> bool:
    """A postscript with that marker, in any case; spaces between its letters are allowed."""
    marker = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(postscript_marker, re.escape(postscript_marker))
    return re.search(marker, response, re.IGNORECASE) is not None


def constrained_response(response: str) -> bool:
    """One of the three answers is in the response."""
    return any(option in response for option in OPTIONS)


def number_bullet_lists(response: str, *, num_bullets: int) -> bool:
    """Exactly so many lines that begin with `-` or with one `*`."""
    return len(re.findall(r"^\s*(?:\*[^*]|-).*$", response, re.MULTILINE)) == num_bullets


def number_highlighted_sections(response: str, *, num_highlights: int) -> bool:
    """At least so many `*highlights*` or `**highlights**` that are not empty."""
    single = re.findall(r"\*([^\n*]*)\*", response)
    double = re.findall(r"\*\*([^\n*]*)\*\*", response)
    return sum(bool(text.strip()) for text in (*single, *double)) >= num_highlights


def multiple_sections(response: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections that begin with the marker and a number."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", response)) >= num_sections


def json_format(response: str) -> bool:
    """The whole response is JSON, within a Markdown fence or not."""
    text = response.strip()
    try:
        json.loads(_FENCE.sub("", text).strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    """A title in double angle brackets, on one line and not empty."""
    return any(found.strip("<> \t") for found in re.findall(r"<<[^\n]+>>", response))
