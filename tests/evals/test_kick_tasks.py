"""The kick tasks on real questions: constant output gains nothing, right answers score, prompts are as published."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import ArtifactError
from compress_evals.data import Found, Unavailable, read
from compress_evals.metrics.answers import normalise
from compress_evals.suite import KICK, MINI, Task, mini
from compress_evals.tasks.facts.functions import strict_choice
from compress_evals.tasks.kick import functions, questions
from compress_evals.tasks.kick.functions import (
    KINDS,
    answered,
    build,
    choice_by_length,
    first_line,
    letter,
    load,
    number,
)
from compress_evals.tasks.kick.questions import CATEGORY, DEPTHS, LENGTHS, Document

SIZES = {
    "freebaseqa": 3999,
    "triviaqa": 3000,
    "nq_closed": 2655,
    "nq_open": 2655,
    "mmlu": 14042,
    "kv": 500,
    "needle": 500,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "piqa": 1838,
    "boolq": 3270,
    "winogrande": 1267,
    "gsm8k": 1319,
}
FREE = ("freebaseqa", "triviaqa", "nq_closed", "nq_open", "kv", "needle")
CHOICES = ("mmlu", "arc_easy", "arc_challenge", "piqa", "boolq", "winogrande")
CONSTANT = ("", "....", "the", "e", "kqzv wpxj")
NOT_IN_THE_FOLDER = {"hellaswag/validation", "cnn_dailymail/test"}
SIGNS = {"triviaqa": 151, "nq_closed": 1, "nq_open": 1}  # accepted answers without a letter, mostly emoji


def test_no_question_counts_twice() -> None:
    counted = [task.needs for task in KICK.tasks if not task.control and task.family == "choice"]
    assert len(set(counted)) == len(counted)


def config(name: str) -> dict[str, Any]:
    """A task file with what it includes, as lm-eval reads it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(KICK.folder / f"{name}.yaml"))


def ours() -> list[Task]:
    """The tasks of the suite whose documents `functions.py` makes."""
    return [
        task
        for task in KICK.tasks
        if Path(config(task.name)["custom_dataset"].__code__.co_filename).stem == "functions"
    ]


def documents(kind: str, folder: Path) -> list[Document]:
    return build(kind, folder, keys=75 if kind == "kv" else None)


def share(score: Callable[..., dict[str, float]], asked: list[Document], said: Any, metric: str) -> float:
    return sum(score(document, said)[metric] for document in asked) / len(asked)


# -- the files -----------------------------------------------------------------------------------


def test_every_task_is_read_by_plain_lm_eval_and_has_its_sample() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(KICK.folder), include_defaults=False)
    assert {task.name for suite in (KICK, mini(KICK)) for task in suite.tasks} < set(manager.all_tasks)
    for task in ours():
        whole, sample = config(task.name), config(task.name + MINI)
        assert sample["dataset_kwargs"] == {**whole["dataset_kwargs"], "n": 200}
        assert {**sample, "task": None, "dataset_kwargs": None} == {**whole, "task": None, "dataset_kwargs": None}


def test_the_groups_are_the_suites_but_for_what_only_the_hub_has() -> None:
    for suite in (KICK, mini(KICK)):
        wanted = [task.name for task in suite.tasks if not NOT_IN_THE_FOLDER & set(task.needs)]
        assert sorted(config(suite.name)["task"]) == sorted(wanted)


def test_a_task_needs_what_its_documents_read_and_has_its_headline() -> None:
    for task in ours():
        found = config(task.name)
        assert task.needs == KINDS[found["dataset_kwargs"]["kind"]][0]
        assert task.headline in {metric["metric"] for metric in found["metric_list"]}


def test_facts_and_kick_may_be_included_together() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(KICK.folder.parent), include_defaults=False)
    assert {"facts", "facts_trained", "kick", "kick_mini", "kick_mmlu", "kick_mmlu_mini"} < set(manager.all_tasks)
    stems = Counter(path.stem for path in KICK.folder.parent.rglob("*.yaml") if not path.stem.startswith("_"))
    assert set(stems.values()) == {1}


def test_the_folder_is_metadata_or_in_the_environment(kick_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.delenv("KICK_DATA_DIR", raising=False)
    options = {"include_path": str(KICK.folder), "include_defaults": False}
    with pytest.raises(Unavailable, match="no data folder was given"):
        TaskManager(**options).load(["kick_piqa_mini"])
    told = TaskManager(**options, metadata={"data_dir": str(kick_data)}).load(["kick_piqa_mini"])["tasks"]
    monkeypatch.setenv("KICK_DATA_DIR", str(kick_data))
    found = TaskManager(**options).load(["kick_piqa_mini"])["tasks"]
    assert list(found["kick_piqa_mini"].eval_docs) == list(told["kick_piqa_mini"].eval_docs)
    with pytest.raises(Unavailable, match="no data folder was given"):  # a run of ours that named none reads none
        load("piqa", data_dir="")


def test_a_row_that_is_not_as_expected_is_named(tmp_path: Path) -> None:
    for name, rows in {
        "triviaqa/no_context": [{"context": "Question: a\nAnswer:", "answer": "b", "aliases": ["b"]}, {"context": "c"}],
        "piqa/validation": [{"query": "q", "choices": ["a", "b"], "gold": 2}],
        "gsm8k/test": [{"question": "q", "answer": "18"}],
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(ArtifactError, match=rf"{path.name}: question {len(rows)} is not as expected"):
            build(path.parent.name, tmp_path)
    (tmp_path / "freebaseqa").mkdir()
    (tmp_path / "freebaseqa" / "eval.txt.gz").write_bytes(gzip.compress(b"a question | an answer\nanother\n"))
    with pytest.raises(ArtifactError, match=r"eval\.txt\.gz: question 2 is not as expected"):
        build("freebaseqa", tmp_path)


# -- the real documents --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
def test_every_question_is_there_once(kind: str, kick_data: Path) -> None:
    asked = documents(kind, kick_data)
    assert len(asked) == SIZES[kind] == len({document["id"] for document in asked})
    assert all({"id", "cluster", "tier", "prompt", "target"} <= set(document) for document in asked)
    assert all(document["prompt"] == document["prompt"].rstrip() and document["target"] for document in asked)
    assert 20 <= len({document["cluster"] for document in asked}) <= len(asked)


@pytest.mark.slow
def test_questions_asked_twice_are_one_with_both_answers(kick_data: Path) -> None:
    asked = documents("freebaseqa", kick_data)
    assert len(read("freebaseqa/eval", kick_data, online=False).rows) == 4023
    assert Counter(len(document["answers"]) for document in asked) == {1: 3975, 2: 24}


def test_twins_and_shared_passages_share_a_cluster(kick_data: Path) -> None:
    sizes = {
        kind: Counter(d["cluster"] for d in documents(kind, kick_data)) for kind in ("winogrande", "mmlu", "boolq")
    }
    assert Counter(sizes["winogrande"].values()) == {1: 797, 2: 235}
    assert max(sizes["mmlu"].values()) <= 10 and len(sizes["mmlu"]) < 14015 - 300
    assert len(sizes["boolq"]) == 2938


def test_open_and_closed_ask_the_same_with_and_without_the_passage(kick_data: Path) -> None:
    closed, opened = documents("nq_closed", kick_data), documents("nq_open", kick_data)
    for without, having in zip(closed, opened, strict=True):
        assert without["id"].partition(":")[2] == having["id"].partition(":")[2]
        assert (without["answers"], without["cluster"]) == (having["answers"], having["cluster"])
        assert having["prompt"].endswith(without["prompt"].removeprefix("Answer these questions:"))
    first = closed[0]["prompt"]
    assert first == "Answer these questions:\n\nQ: who got the first nobel prize in physics\nA:"


def test_the_wording_is_llm_kicks_without_the_space(kick_data: Path) -> None:
    assert documents("freebaseqa", kick_data)[1]["prompt"] == (
        "Please give answer to this question: 1980 Pac Man was released arcade version by which company\nThe answer is"
    )
    opened = documents("nq_open", kick_data)[1]["prompt"]
    assert opened == (
        "Deadpool 2 is scheduled to be released in the United States on May 18, 2018.  A sequel, Deadpool 3, is in "
        "development.\n\nBased on these texts, answer these questions:\n\nQ: when is the next deadpool movie being "
        "released\nA:"
    )


# -- no constant wins ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", FREE)
def test_constant_answers_are_never_right(kind: str, kick_data: Path) -> None:
    asked = documents(kind, kick_data)
    scores = {said: [answered(document, [said]) for document in asked] for said in CONSTANT}
    right = {said: sum(score["em"] for score in scores[said]) for said in CONSTANT}
    # one question of TriviaQA asks for the commonest letter of English, which is E
    assert right == dict.fromkeys(CONSTANT, 0) | ({"e": 1} if kind == "triviaqa" else {})
    for said in CONSTANT:
        assert sum(score["contains"] for score in scores[said]) == right[said]
        assert sum(score["f1"] for score in scores[said]) < 0.01 * len(asked)
    assert not any(score["valid"] for score in scores["...."])


def test_constant_letters_and_numbers_are_never_right(kick_data: Path) -> None:
    asked, sums = documents("mmlu", kick_data), documents("gsm8k", kick_data)
    for said in CONSTANT:
        assert share(letter, asked, [said], "acc") == share(letter, asked, [said], "valid") == 0
        assert share(number, sums, [said], "em") == 0
    assert share(letter, asked, [" D"], "acc") < 0.27  # always the same letter: chance


@pytest.mark.parametrize("kind", CHOICES)
def test_a_model_that_prefers_nothing_has_no_choice_right(kind: str, kick_data: Path) -> None:
    chance = next(task.chance for task in KICK.tasks if task.name == f"kick_{kind}")
    asked = documents(kind, kick_data)
    for score in (0.0, -1.5, math.nan, -math.inf, math.inf):
        constant = [[(score, False)] * len(document["choices"]) for document in asked]
        assert not any(strict_choice(d, s)["acc"] for d, s in zip(asked, constant, strict=True))
    for always in range(len(asked[0]["choices"])):
        golds = sum(document["gold"] == always for document in asked)
        assert golds / len(asked) <= chance + 0.02


@pytest.mark.parametrize("kind", ["arc_easy", "arc_challenge", "piqa"])
def test_length_gives_no_more_than_chance_to_a_model_without_taste(kind: str, kick_data: Path) -> None:
    asked = documents(kind, kick_data)
    for score in (-1.5, math.nan):
        rates = [choice_by_length(d, [(score, False)] * len(d["choices"])) for d in asked]
        assert sum(rate["acc"] for rate in rates) == 0
        # by the character the longest choice wins, which is right less often than a guess
        assert sum(rate["acc_norm"] for rate in rates) / len(asked) < 1 / len(asked[0]["choices"])


# -- right answers win ---------------------------------------------------------------------------


REAL = {
    "triviaqa": {
        0: (["Onion", " onions", "Allium cepa."], ["garlic", "an onion ring", "Oni"]),
        1: (["Antelope", "an antelope", "ANTELOPES"], ["Deer", "ante", "the"]),
        2: (["a horse", "Equus ferus caballus"], ["Garron", "hors", "a sea horse"]),
        3: (["Dieppe", "Dieppe, France", "DIEPPE."], ["Dunkirk", "not Dieppe", "France"]),
        5: (["Edward III", "King Edward III", "edward 3"], ["Edward II", "Edward", "III"]),
        6: (["Leprosy", "Hansen\u2019s disease", "Hansen's Disease"], ["Lepr", "a disease", "plague"]),
        8: (["Eleanor Rigby", "\u201cEleanor Rigby\u201d", "the Eleanor Rigby"], ["Eleanor", "Rigby", "Help!"]),
        9: (["Will Carling", "WILLIAM CARLING"], ["Carling", "Will", "Not Will Carling"]),
        11: (["The French Connection", "French Connection", '"The French Connection"'], ["French", "Connection II"]),
        14: (["Dusseldorf", "D\u00fcsseldorf", "Du\u0308sseldorf", "D\u00fcsseldorf, Germany"], ["Cologne", "Germany"]),
    },
    "nq_closed": {
        0: (
            ["Wilhelm Conrad R\u00f6ntgen", "wilhelm conrad ro\u0308ntgen."],
            ["R\u00f6ntgen's wife", "Marie Curie", ""],
        ),
        1: (["May 18, 2018", "may 18 2018"], ["May 18", "2018", "May 18, 2019"]),
        5: (["Dai Yongge", " Xiu Li Dai", "dai xiuli"], ["Dai", "Yongge", "Reading"]),
        6: (["2017", "Super Bowl LII"], ["2018", "20 17", "Super Bowl"]),
        7: (["291", "291 episodes", "291."], ["290", "episodes", "2911"]),
        8: (["Raymond Unwin", "The planner Raymond Unwin"], ["Raymond", "Barry", "an architect"]),
        12: (["David J. Ryder", "david j ryder", "David Motl"], ["David Ryder", "David", "J."]),
        17: (["Tulsa, Oklahoma", "Tulsa Oklahoma"], ["Tulsa", "Oklahoma", "Not in Tulsa, Oklahoma"]),
        23: (["14", "14.", " 14"], ["1", "4", "fourteen countries", "114"]),
        25: (["Old Trafford", "old trafford!"], ["Trafford", "Old", "Anfield"]),
    },
}


@pytest.mark.parametrize("kind", REAL)
def test_aliases_of_real_questions(kind: str, kick_data: Path) -> None:
    asked = documents(kind, kick_data)
    for i, (right, wrong) in REAL[kind].items():
        assert [answered(asked[i], [said])["em"] for said in right] == [1.0] * len(right), asked[i]["answers"]
        assert [answered(asked[i], [said])["em"] for said in wrong] == [0.0] * len(wrong), asked[i]["answers"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["triviaqa", "nq_closed", "nq_open", "freebaseqa", "kv", "needle"])
def test_every_answer_can_be_reached(kind: str, kick_data: Path) -> None:
    asked = documents(kind, kick_data)
    stops = [until for task in ours() for until in config(task.name).get("generation_kwargs", {}).get("until", [])]
    assert set(stops) == {"\n", "\nQ:"}
    cut = [d for d in asked if any("\n" in answer for answer in d["answers"])]
    unreachable = [d for d in asked if not any(answered(d, [f" {answer}"])["em"] for answer in d["answers"])]
    assert (len(cut), len(unreachable)) == (0, 0)
    answers = [answer for d in asked for answer in d["answers"]]
    lost = sum(not normalise(answer) for answer in answers)  # never right by itself; every question has others
    assert lost == SIGNS.get(kind, 0) and lost < 0.01 * len(answers)


def test_full_stops_and_commas_would_have_put_answers_out_of_reach(kick_data: Path) -> None:
    asked = documents("nq_closed", kick_data)
    stopped = [d for d in asked if all(re.search("[.,]", answer) for answer in d["answers"])]
    assert len(stopped) / len(asked) == pytest.approx(0.0825, abs=0.001)


def test_accents_matter_only_to_exact_match() -> None:
    asked = {"answers": ["Wilhelm Conrad Röntgen"]}
    found = answered(asked, ["Wilhelm Conrad Rontgen"])
    assert (found["em"], found["em_folded"]) == (0.0, 1.0)


def test_a_denial_is_not_the_answer() -> None:
    found = answered({"answers": ["Mark Twain"]}, [" not Mark Twain"])
    assert found["em"] == 0.0 and found["contains"] == 1.0 and found["f1"] == pytest.approx(0.8)


def test_only_the_first_line_is_the_answer() -> None:
    assert first_line("\n\n Paris \nParis is") == "Paris "
    assert answered({"answers": ["Paris"]}, [" London\nParis"])["contains"] == 0.0
    assert first_line("") == ""


def test_a_letter_is_one_capital_and_nothing_else() -> None:
    asked = {"gold": 1}
    found = {said: letter(asked, [said]) for said in (" B", "B", " A", "b", "E", "", " Both", "AB", "B.")}
    assert {said for said, scores in found.items() if scores["acc"]} == {" B", "B"}
    assert {said for said, scores in found.items() if scores["valid"]} == {" B", "B", " A"}


def test_the_last_number_is_the_answer() -> None:
    asked = {"answers": ["1,018"]}
    right = ("So 1018.", "= $1,018", "2 + 1016 = 1018.00 in all")
    wrong = ("1018 or 7", "", "none", "101 8", "-1018", "1,018.5")
    assert [number(asked, [said])["em"] for said in right] == [1.0] * len(right)
    assert [number(asked, [said])["em"] for said in wrong] == [0.0] * len(wrong)
    assert number(asked, ["none"])["valid"] == 0.0


def test_characters_decide_only_the_second_score() -> None:
    asked = {"gold": 1, "choices": ["ab", "abcdefgh"]}
    assert choice_by_length(asked, [(-2.0, False), (-4.0, False)]) == {"acc": 0.0, "acc_norm": 1.0}
    assert choice_by_length(asked, [(-4.0, False), (-2.0, False)]) == {"acc": 1.0, "acc_norm": 1.0}


# -- MMLU ----------------------------------------------------------------------------------------

ASTRONOMY = """The following are multiple choice questions (with answers) about  astronomy.

You are pushing a truck along a road. Would it be easier to accelerate this truck on Mars? Why? (Assume there is no friction)
A. It would be harder since the truck is heavier on Mars.
B. It would be easier since the truck is lighter on Mars.
C. It would be harder since the truck is lighter on Mars.
D. It would be the same no matter where you are.
Answer: D

Where do most short-period comets come from and how do we know?
A. The Kuiper belt; short period comets tend to be in the plane of the solar system just like the Kuiper belt.
B. The Kuiper belt; short period comets tend to come from random directions indicating a spherical distribution of comets called the Kuiper belt.
C. The asteroid belt; short period comets have orbital periods similar to asteroids like Vesta and are found in the plane of the solar system just like the asteroid belt.
D. The Oort cloud; short period comets tend to be in the plane of the solar system just like the Oort cloud.
Answer: A

Say the pupil of your eye has a diameter of 5 mm and you have a telescope with an aperture of 50 cm. How much more light can the telescope gather than your eye?
A. 10000 times more
B. 100 times more
C. 1000 times more
D. 10 times more
Answer: A

Why isn't there a planet where the asteroid belt is located?
A. A planet once formed here but it was broken apart by a catastrophic collision.
B. There was not enough material in this part of the solar nebula to form a planet.
C. There was too much rocky material to form a terrestrial planet but not enough gaseous material to form a jovian planet.
D. Resonance with Jupiter prevented material from collecting together to form a planet.
Answer: D

Why is Mars red?
A. Because the surface is covered with heavily oxidized ("rusted") minerals.
B. Because the atmosphere scatters more light at bluer wavelengths transmitting mostly red light.
C. Because Mars is covered with ancient lava flows which are red in color.
D. Because flowing water on Mars's surface altered the surface minerals several billion years ago.
Answer: A

"""  # noqa: E501


def test_an_mmlu_prompt_is_the_published_one_to_the_character(kick_data: Path) -> None:
    row = next(r for r in read("mmlu/test", kick_data, online=False).rows if r["subject"] == "astronomy")
    a, b, c, d = row["choices"]
    asked = f"{row['question']}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
    found = next(d for d in documents("mmlu", kick_data) if " about  astronomy." in d["prompt"])
    assert found["prompt"] == ASTRONOMY + asked
    assert found["target"] == " " + "ABCD"[row["answer"]] and found["choices"] == ["A", "B", "C", "D"]


def test_every_subject_has_five_examples_of_its_own_and_one_of_four_categories(kick_data: Path) -> None:
    subjects = {row["subject"]: row for row in read("mmlu/test", kick_data, online=False).rows}
    assert len(subjects) == 57 and set(subjects) == set(CATEGORY)
    asked = documents("mmlu", kick_data)
    answers = [re.findall(r"\nAnswer: [A-D]\n\n", document["prompt"]) for document in asked]
    assert {len(found) for found in answers} == {5}
    assert Counter(document["tier"] for document in asked) == {
        "humanities": 4705,
        "social sciences": 3077,
        "STEM": 3018,
        "other": 3242,
    }


def test_lm_eval_asks_for_letters_after_a_space(kick_data: Path) -> None:
    task = loaded(kick_data, "kick_mmlu_mini")
    document = task.eval_docs[0]
    requests = task.construct_requests(document, document["prompt"], metadata=("kick_mmlu_mini", 0, 1))
    assert [request.args for request in requests] == [(document["prompt"], f" {choice}") for choice in "ABCD"]


# -- retrieval -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [10, 75])
def test_the_value_stands_once_in_a_json_object_of_so_many_keys(keys: int, kick_data: Path) -> None:
    places = Counter()
    for document in build("kv", kick_data, keys=keys):
        text = document["prompt"].partition("JSON data:\n")[2].partition("\n\nKey: ")
        table, asked = json.loads(text[0]), json.loads(text[2].partition("\n")[0])
        assert len(table) == keys and [table[asked]] == document["answers"]
        assert document["prompt"].count(document["answers"][0]) == 1
        place = list(table).index(asked)
        places[place] += 1
        assert document["tier"] == ["start", "middle", "end"][place * 3 // keys]
    assert keys == 75 or set(places.values()) == {50}


def test_the_needle_stands_once_at_its_depth_in_passages_of_its_length(kick_data: Path) -> None:
    asked = documents("needle", kick_data)
    assert Counter(document["tier"] for document in asked) == {str(length): 100 for length in LENGTHS}
    for document in asked:
        length, depth, _ = map(int, document["id"].partition(":")[2].split("-"))
        context, _, question = document["prompt"].rpartition("\n\nQ: ")
        [number] = document["answers"]
        assert context.count(number) == 1 and number not in question
        told = re.search(rf"The secret number of (\w+) is {number}\.", context)
        assert told is not None and question == f"What is the secret number of {told[1]}?\nA:"
        assert context.count(told[1]) == 1
        hay = len(context) - len(told[0]) - 1
        assert abs(hay - 4 * length) <= 1
        # passages are some 470 characters long, the longest 1,796, and a needle goes between two of them
        assert abs(told.start() - depth / 100 * hay) < 0.25 * hay + 400
    assert {document["id"].split("-")[1] for document in asked} == {str(depth) for depth in DEPTHS}


# -- through lm-eval -----------------------------------------------------------------------------


def loaded(folder: Path, name: str) -> Any:
    from lm_eval.tasks import TaskManager

    options = {"include_path": str(KICK.folder), "include_defaults": False}
    return TaskManager(**options, metadata={"data_dir": str(folder)}).load([name])["tasks"][name]


def test_winogrande_has_two_contexts_and_one_continuation(kick_data: Path) -> None:
    task = loaded(kick_data, "kick_winogrande_mini")
    document = task.eval_docs[0]
    contexts = task.fewshot_context(document, num_fewshot=0)
    requests = task.construct_requests(document, contexts, metadata=("kick_winogrande_mini", 0, 1))
    assert [request.args for request in requests] == [
        (context, f" {document['continuation']}") for context in document["choices"]
    ]
    scores = [(-1.0, False) if i == document["gold"] else (-2.0, False) for i in range(2)]
    assert task.process_results(document, scores) == {"acc": 1.0}


def test_hellaswag_goes_on_where_its_question_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"query": "Roofing: A man is on a roof. He", "choices": ["sits.", "falls.", "sings.", "eats."], "gold": 2}
    found = Found(rows=[row], source="hub", name="Rowan/hellaswag/validation", sha256="0")
    monkeypatch.setattr(functions, "read", lambda name, folder, online: found)
    [document] = build("hellaswag", None, online=True)
    assert (document["prompt"], document["target"]) == ("Roofing: A man is on a roof. He", " sings.")


@pytest.mark.slow
def test_a_sample_is_fixed_and_in_proportion_to_tiers(kick_data: Path) -> None:
    whole = documents("mmlu", kick_data)
    sample = list(load("mmlu", n=200, data_dir=str(kick_data))["test"])
    assert sample == list(load("mmlu", n=200, data_dir=str(kick_data))["test"])
    rates = Counter(document["tier"] for document in whole)
    found = Counter(document["tier"] for document in sample)
    assert len(sample) == 200 and all(abs(found[tier] - 200 * rates[tier] / 14042) <= 1 for tier in rates)
    assert [document["id"] for document in sample] != [document["id"] for document in whole[:200]]
    larger = {document["id"] for document in load("mmlu", n=400, data_dir=str(kick_data))["test"]}
    assert {document["id"] for document in sample} < larger


def test_open_and_closed_samples_are_the_same_questions(kick_data: Path) -> None:
    rows = [
        [document["id"].partition(":")[2] for document in load(kind, n=200, data_dir=str(kick_data))["test"]]
        for kind in ("nq_open", "nq_closed")
    ]
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def untrained(kick_data: Path) -> tuple[Any, Any]:
    """A one-layer Llama of 2,048 positions that has learned nothing, and a tokenizer of English and UUIDs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [document["prompt"] for kind in ("nq_open", "kv") for document in documents(kind, kick_data)[:200]]
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=100_000
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=32,
        num_attention_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.mark.slow
def test_an_eighth_of_the_sample_is_asked_of_a_tiny_model(kick_data: Path, untrained: tuple[Any, Any]) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = untrained
    asked = [task for task in mini(KICK).tasks if task.name.removesuffix(MINI) in {task.name for task in ours()}]
    asked = [task for task in asked if not NOT_IN_THE_FOLDER & set(task.needs)]
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
        tasks=[task.name for task in asked],
        task_manager=TaskManager(
            include_path=str(KICK.folder), include_defaults=False, metadata={"data_dir": str(kick_data)}
        ),
        bootstrap_iters=0,
        limit=25,
    )
    assert found is not None
    for task in asked:
        assert found["n-samples"][task.name] == {"original": 200, "effective": 25}
        ceiling = task.chance + (0.35 if task.chance else 0.02)  # 3.5 standard errors of 25 questions
        assert found["results"][task.name][f"{task.headline},none"] <= ceiling, task.name


def test_a_kind_that_there_is_not_is_a_bug() -> None:
    with pytest.raises(KeyError, match="riddles"):
        build("riddles", None)
    assert set(KINDS) == {config(task.name)["dataset_kwargs"]["kind"] for task in ours()}
    assert questions.SHOTS == 5
