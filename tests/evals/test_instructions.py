"""All 25 kinds of instruction, one by one and compared with lm-eval's own checkers on the 541 prompts."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress_evals.metrics.instructions import CHECKERS, follows, instruction_scores, loosened
from compress_evals.metrics.instructions.language import detected
from compress_evals.metrics.instructions.sentences import count_sentences
from compress_evals.metrics.text import says_something

Prompt = dict[str, Any]
CONSTANT = ["", "....", "the", "e", "the the the the", "***", "?!\n"]
NOISE_FOLLOWS = 0.11  # the share of prompts whose instructions random words follow: Task.chance of kick_ifeval
ENGLISH = "this is an english answer of several words"
PROSE = (
    "Here is my answer. It has some sentences, and a BIG ONE was written at night! Was it? Yes.\n\n* one point\n"
    "* another *marked* point\n\n- a third **bold** one\n\n***\n\nSection 1 begins. <<A Title>> [name] and [address]"
    "\n\nP.S. My answer is no."
)

EXAMPLES: list[tuple[str, dict[str, Any], str, str]] = [  # kind, options, a response that follows, one that does not
    ("change_case:capital_word_frequency", {"capital_frequency": 3, "capital_relation": "at least"},
     "I saw NASA and a WELL-KNOWN man", "I saw a man from NASA"),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"},
     "we saw NASA's new ship", "we saw NASA and ESA"),
    ("change_case:english_capital", {}, "THE WEATHER IS VERY NICE TODAY AND WE ARE GOING TO THE BEACH",
     "THIS ANSWER IS NOT written IN CAPITALS"),
    ("change_case:english_lowercase", {}, "this answer is written in english with many words",
     "This answer is written in english"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it again. "}, "say it again. Here it is.",
     "Here it is. Say it again."),
    ("combination:two_responses", {}, "one of them\n******\nthe other", "one of them\n******\none of them"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "dear [name] of [town]", "dear [name] of town"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "all is well\n\np. s. not quite",
     "all is well, PS not quite"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "all is well\nP.P.S. not quite",
     "all is well\nP.S. not quite"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "My answer is perhaps."),
    ("detectable_format:json_format", {}, '```json\n{"a": ["b", "c"]}\n```', 'here: {"a": ["b", "c"]}'),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, "Day 1 rest\nDay 2 work",
     "Day 1 rest\nDay two work"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one thing\n  - another",
     "* one thing\n**another**"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one thing* and **another**",
     "*one thing* and ** ** another"),
    ("detectable_format:title", {}, "<<the title>>\nand more", "<< >>\nno title here"),
    ("keywords:existence", {"keywords": ["storm", "sea "]}, "Stormy seas ahead", "stormy days ahead"),
    ("keywords:forbidden_words", {"forbidden_words": ["run"]}, "they kept running home", "they had to RUN home"),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}, "Seas and the sea",
     "by the sea"),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": "at least"}, "stop it now!!",
     "stop it now!"),
    ("keywords:letter_frequency", {"letter": "Q", "let_frequency": 1, "let_relation": "less than"}, "ask me now",
     "a quick question"),
    ("language:response_language", {"language": "de"}, "Das ist eine Antwort in deutscher Sprache",
     "This is an answer in the English language"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Elm"},
     "one for all\n\n\"elm's are trees", "elm are trees\n\none for all"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one of two\n***\nand two",
     "one of two\n\nand two"),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"}, "One is. Two are! Three?",
     "One is for Dr. No and two"),
    ("length_constraints:number_words", {"num_words": 4, "relation": "less than"}, "one two three", "one, two, don't"),
    ("punctuation:no_comma", {}, "one and two and three", "one, two and three"),
    ("startend:end_checker", {"end_phrase": "Any other questions? "}, "\"well then. any other questions?\"",
     "Any other questions? Bye then now"),
    ("startend:quotation", {}, ' "all of this" ', '"some" of this'),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "right", "wrong"), EXAMPLES)
def test_each_kind_is_checked(kind: str, options: dict[str, Any], right: str, wrong: str) -> None:
    assert follows(right, kind, options)
    assert not follows(wrong, kind, options)


def test_every_kind_has_an_example() -> None:
    assert {kind for kind, *_ in EXAMPLES} == set(CHECKERS)
    assert len(CHECKERS) == 25


@pytest.mark.parametrize("response", CONSTANT)
@pytest.mark.parametrize("kind", ["punctuation:no_comma", "language:response_language"])
def test_saying_nothing_follows_nothing(kind: str, response: str) -> None:
    options = {"language": "en"} if kind.startswith("language") else {}
    assert set(instruction_scores(response, [kind], [options]).values()) == {0.0}


def test_unknown_instructions_and_relations_are_refused() -> None:
    with pytest.raises(ValueError, match="no instruction of kind 'a:b'"):
        follows(ENGLISH, "a:b", {})
    with pytest.raises(ValueError, match="not 'about'"):
        follows(ENGLISH, "length_constraints:number_words", {"num_words": 3, "relation": "about"})


def test_options_that_are_none_are_not_given() -> None:
    assert follows(ENGLISH, "punctuation:no_comma", {"num_words": None})


def test_loose_forgives_a_first_line_and_emphasis() -> None:
    response = "Sure, here it is:\n\n*all small english words of an answer*\nBye, then"
    scores = instruction_scores(response, ["punctuation:no_comma", "startend:quotation"], [{}, {}])
    assert scores == {"prompt_strict": 0, "inst_strict": 0, "prompt_loose": 0, "inst_loose": 0.5}
    assert len(loosened(response)) == 8


def test_the_language_told_does_not_change() -> None:
    short = "hotel taxi telefon"  # unseeded, it is Hungarian half of the time, else Catalan
    told = {detected(short) for _ in range(20)}
    assert len(told) == 1


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("", 0),
        ("...", 0),
        ("No end", 1),
        ("One. Two", 2),
        ("one. two. three.", 3),
        ("Dr. Smith paid 3.5 crowns at 5 p.m. today! Did he? Yes... maybe.", 3),
        ("J. K. Rowling wrote it. So did I. Then we left.", 3),
        ('"Stop!" he said. (Nobody did.) **The end.**', 4),
        ("1. First of all\n2. Then this\n", 1),
        ("Fruit, bread, etc. are sold. Buy milk, etc. Then go.", 3),
        ("It costs 3. Buy it at www.shop.com today.", 2),
        ("彼は来た。彼女も来た。", 2),
        ("वह आया। वह गया।", 2),
    ],
)
def test_sentences_are_counted(text: str, n: int) -> None:
    assert count_sentences(text) == n


# -- beside lm-eval's checkers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(kick_data: Path) -> list[Prompt]:
    text = (kick_data / "ifeval" / "input_data.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


@pytest.fixture(scope="module")
def published() -> Iterator[Any]:
    """lm-eval's scorer with an untrained Punkt and NLTK's own word rules in place of the data it would download."""
    import langdetect
    import nltk
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "immutabledict", SimpleNamespace(immutabledict=dict))  # not installed; a table only
        patch.setattr(nltk.data, "find", lambda *_: None)
        patch.setattr(nltk, "word_tokenize", NLTKWordTokenizer().tokenize)
        patch.setattr(langdetect.DetectorFactory, "seed", 0)
        from lm_eval.tasks.ifeval import instructions, instructions_util, utils

        patch.setattr(instructions_util, "_get_sentence_tokenizer", PunktSentenceTokenizer)
        patch.setattr(instructions.logger, "disabled", True)
        yield utils


def published_scores(published: Any, prompt: Prompt, response: str) -> tuple[list[bool], list[bool]]:
    example = published.InputExample(prompt["key"], prompt["instruction_id_list"], prompt["prompt"], prompt["kwargs"])
    strict = published.test_instruction_following_strict(example, response)
    loose = published.test_instruction_following_loose(example, response)
    return strict.follow_instruction_list, loose.follow_instruction_list


def own_scores(prompt: Prompt, response: str) -> tuple[list[bool], list[bool]]:
    told = list(zip(prompt["instruction_id_list"], prompt["kwargs"], strict=True))
    strict = [follows(response, *one) for one in told]
    return strict, [any(follows(text, *one) for text in loosened(response)) for one in told]


def obedient(prompt: Prompt) -> str:
    """A response that follows most instructions, made of what they ask for."""
    parts, kinds = [ENGLISH], prompt["instruction_id_list"]
    for kind, options in zip(kinds, prompt["kwargs"], strict=True):
        match kind.partition(":")[2], options:
            case "existence", {"keywords": keywords}:
                parts.append(" ".join(keywords))
            case "frequency", {"keyword": keyword, "frequency": n}:
                parts.append(f"{keyword} " * n)
            case "number_placeholders", {"num_placeholders": n}:
                parts.append("[thing] " * n)
            case "number_bullet_lists", {"num_bullets": n}:
                parts.append("* a point\n" * n)
            case "number_highlighted_sections", {"num_highlights": n}:
                parts.append("*a high light* " * n)
            case "multiple_sections", {"section_spliter": marker, "num_sections": n}:
                parts.append("\n".join(f"{marker} {i} is here" for i in range(1, n + 1)))
            case "number_paragraphs", {"num_paragraphs": n}:
                parts.append("\n***\n".join(["and more of it"] * n))
            case "nth_paragraph_first_word", {"first_word": word, "num_paragraphs": n}:
                parts = ["\n\n".join([f"{word} and so on"] * n)]
            case "number_sentences", {"num_sentences": n, "relation": "at least"}:
                parts.append("This is one. " * n)
            case "number_words", {"num_words": n, "relation": "at least"}:
                parts.append("one more word " * n)
            case "letter_frequency", {"letter": letter, "let_frequency": n, "let_relation": "at least"}:
                parts.append(letter * n)
            case "capital_word_frequency", {"capital_frequency": n, "capital_relation": "at least"}:
                parts.append("LOUD " * n)
            case "postscript", {"postscript_marker": marker}:
                parts.append(f"{marker} good bye")
            case "title", _:
                parts.append("<<a title>>")
            case "two_responses", _:
                parts.append("\n******\nanother answer in english")
            case "constrained_response", _:
                parts.append("My answer is maybe.")
            case "end_checker", {"end_phrase": phrase}:
                parts.append(phrase)
            case "repeat_prompt", {"prompt_to_repeat": request}:
                parts.insert(0, request)
            case "json_format", _:
                parts = ['{"an": "answer", "in": "english"}']
            case _:
                pass
    text = "\n".join(parts)
    text = f'"{text}"' if "startend:quotation" in kinds else text
    text = text.upper() if "change_case:english_capital" in kinds else text
    return text.lower() if "change_case:english_lowercase" in kinds else text


def noise(prompt: Prompt) -> str:
    rng = random.Random(prompt["key"])
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(50))


def explained(kind: str, options: dict[str, Any], response: str) -> bool:
    """The two ways in which the checkers may differ: lm-eval draws a random letter for `!` and `#`, and ours count a
    variant that is left with fewer than three different words as saying nothing."""
    if kind == "keywords:letter_frequency" and not options["letter"].isalpha():
        return True
    return not all(says_something(text) for text in loosened(response) if text.strip())


@pytest.mark.parametrize(
    "respond",
    [
        pytest.param(obedient, id="obedient"),
        pytest.param(noise, id="noise", marks=pytest.mark.slow),
        pytest.param(lambda prompt: prompt["prompt"], id="echo", marks=pytest.mark.slow),
        pytest.param(lambda prompt: PROSE, id="prose", marks=pytest.mark.slow),
    ],
)
def test_checkers_agree_with_lm_eval(prompts: list[Prompt], published: Any, respond: Callable[[Prompt], str]) -> None:
    differences, followed = [], 0
    for prompt in prompts:
        response = respond(prompt)
        (strict, loose), theirs = own_scores(prompt, response), published_scores(published, prompt, response)
        followed += sum(strict)
        for kind, options, *verdicts in zip(
            prompt["instruction_id_list"], prompt["kwargs"], strict, theirs[0], loose, theirs[1], strict=True
        ):
            if verdicts[0] != verdicts[1] or (verdicts[2] != verdicts[3]):
                differences.append((prompt["key"], kind, explained(kind, options, response)))
    assert [difference for difference in differences if not difference[2]] == []
    assert followed > 100  # both ways of every verdict are compared


@pytest.mark.slow
def test_most_instructions_can_be_followed(prompts: list[Prompt]) -> None:
    scores = [instruction_scores(obedient(p), p["instruction_id_list"], p["kwargs"]) for p in prompts]
    assert sum(score["prompt_strict"] for score in scores) > 0.8 * len(prompts)
    assert all(score["prompt_strict"] <= score["prompt_loose"] for score in scores)
    assert all(score["inst_strict"] <= score["inst_loose"] for score in scores)


@pytest.mark.parametrize("response", CONSTANT)
def test_constant_responses_score_nothing_on_all_prompts(prompts: list[Prompt], response: str) -> None:
    assert len(prompts) == 541
    for prompt in prompts:
        assert not any(instruction_scores(response, prompt["instruction_id_list"], prompt["kwargs"]).values())


def test_lm_eval_pays_a_model_that_prints_dots(prompts: list[Prompt], published: Any) -> None:
    paid = sum(all(published_scores(published, prompt, "....")[0]) for prompt in prompts)
    assert paid == 81  # 15 % of the prompts: why ours ask for three words


@pytest.mark.slow
def test_noise_follows_what_the_task_calls_chance(prompts: list[Prompt]) -> None:
    scores = [instruction_scores(noise(p), p["instruction_id_list"], p["kwargs"])["prompt_strict"] for p in prompts]
    assert sum(scores) / len(scores) == pytest.approx(NOISE_FOLLOWS, abs=0.02)
