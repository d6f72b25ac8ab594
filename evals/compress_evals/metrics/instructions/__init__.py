"""Checks whether a response follows its instructions, for all 25 kinds of instruction of IFEval.

Each kind has one plain function, in files by family; its options have the names that the data gives them.
Source: Zhou et al., "Instruction-following evaluation for large language models", 2023 (table 1).
Deviations: a response with fewer than three different words follows no instruction (an empty one would otherwise pass
"no comma"; the published checker only refuses white space); a response whose language cannot be detected counts as
being in no language; sentences and capitalised words are counted by rules instead of by Punkt and the Treebank
tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compress_evals.metrics.instructions import form, keywords, language, length, wording
from compress_evals.metrics.text import says_something

CHECKERS: dict[str, Callable[..., bool]] = {
    "change_case:capital_word_frequency": language.capital_word_frequency,
    "change_case:english_capital": language.english_capital,
    "change_case:english_lowercase": language.english_lowercase,
    "combination:repeat_prompt": wording.repeat_prompt,
    "combination:two_responses": wording.two_responses,
    "detectable_content:number_placeholders": form.number_placeholders,
    "detectable_content:postscript": form.postscript,
    "detectable_format:constrained_response": form.constrained_response,
    "detectable_format:json_format": form.json_format,
    "detectable_format:multiple_sections": form.multiple_sections,
    "detectable_format:number_bullet_lists": form.number_bullet_lists,
    "detectable_format:number_highlighted_sections": form.number_highlighted_sections,
    "detectable_format:title": form.title,
    "keywords:existence": keywords.existence,
    "keywords:forbidden_words": keywords.forbidden_words,
    "keywords:frequency": keywords.frequency,
    "keywords:letter_frequency": keywords.letter_frequency,
    "language:response_language": language.response_language,
    "length_constraints:nth_paragraph_first_word": length.nth_paragraph_first_word,
    "length_constraints:number_paragraphs": length.number_paragraphs,
    "length_constraints:number_sentences": length.number_sentences,
    "length_constraints:number_words": length.number_words,
    "punctuation:no_comma": wording.no_comma,
    "startend:end_checker": wording.end_checker,
    "startend:quotation": wording.quotation,
}
Options = Mapping[str, Any]


def follows(response: str, kind: str, options: Options) -> bool:
    """Whether the response says something and follows one instruction; options that are None count as not given.

    Raises ValueError for an unknown kind of instruction.
    """
    if kind not in CHECKERS:
        raise ValueError(f"there is no instruction of kind {kind!r}; known are {', '.join(CHECKERS)}")
    given = {name: value for name, value in options.items() if value is not None}
    return says_something(response) and CHECKERS[kind](response, **given)


def loosened(response: str) -> list[str]:
    """The eight variants of a response that IFEval's loose accuracy accepts.

    They are the response as it is, without its first line, without its last line and without both, each with and
    without asterisks. This forgives introductions such as "Sure, here it is:" and emphasis.
    """
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]


def instruction_scores(response: str, kinds: Sequence[str], options: Sequence[Options]) -> dict[str, float]:
    """The four IFEval accuracies of one response.

    `prompt_strict` and `prompt_loose` are 1 if every instruction is followed, else 0; `inst_strict` and `inst_loose`
    are the share that is followed. Loose takes, for each instruction, the best of `loosened`. The published
    instruction-level accuracy is over the instructions of all prompts together, so that a prompt with three counts
    three times; here every prompt counts once.
    """
    told = list(zip(kinds, options, strict=True))
    strict = [follows(response, kind, given) for kind, given in told]
    variants = loosened(response)
    loose = [done or any(follows(text, *one) for text in variants) for done, one in zip(strict, told, strict=True)]
    return {
        "prompt_strict": float(all(strict)),
        "inst_strict": sum(strict) / len(strict),
        "prompt_loose": float(all(loose)),
        "inst_loose": sum(loose) / len(loose),
    }
