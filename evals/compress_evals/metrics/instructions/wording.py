"""Checks of how a response begins and ends, and of what it repeats or leaves out."""

from __future__ import annotations


def no_comma(response: str) -> bool:
    """Whether the response has no comma."""
    return "," not in response


def end_checker(response: str, *, end_phrase: str) -> bool:
    """Whether the response ends with that phrase, in any case; quotes around the response are ignored."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(response: str) -> bool:
    """Whether the whole response is enclosed in double quotes."""
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def repeat_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    """Whether the response begins by repeating the request, in any case."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def two_responses(response: str) -> bool:
    """Whether there are two different responses separated by `******`, neither of them empty."""
    parts = [part.strip() for part in response.split("******")]
    inner, given = parts[1:-1], [part for part in parts if part]
    return all(inner) and len(given) == 2 and given[0] != given[1]
