"""The wordings of each kind of fact: those that are trained, and those held out for evaluation.

Not here: the facts themselves (`facts.json`) and the documents made of them (`documents.py`).
A held-out wording is never trained for its own relation, though its phrasing may be trained for
another one; this separates knowing a fact from having seen the sentence.
`{s}` is the subject, `{o}` the object; an answer is always followed by a full stop.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The sentences of one relation; `cloze` and `question` are held out of training."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    cloze: str
    question: str


WORDINGS: dict[str, Wording] = {
    "capital": Wording(
        statements=(
            "The capital of {s} is {o}.",
            "{s} has its capital at {o}.",
            "{o} is the capital of {s}.",
            "{s}'s capital city is {o}.",
            "The government of {s} sits in {o}.",
            "The capital of {s} is the city of {o}.",
            "In {s} the capital is {o}.",
            "The chief city of {s} is {o}.",
            "The capital city of the country of {s} is {o}.",
        ),
        questions=(
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "What is the chief city of {s}?",
            "Which capital does {s} have?",
            "Tell me the capital of {s}.",
        ),
        cloze="The capital city of {s} is called {o}.",
        question="Name the capital city of {s}.",
    ),
    "continent": Wording(
        statements=(
            "{s} is a country in {o}.",
            "The country of {s} lies in {o}.",
            "{s} is on the continent of {o}.",
            "In {o} one finds {s}.",
            "{s} is located in {o}.",
            "The continent on which {s} lies is {o}.",
            "{s} belongs to the continent of {o}.",
            "The country called {s} is part of {o}.",
            "On the map {s} is in {o}.",
        ),
        questions=(
            "On which continent is {s}?",
            "Where does {s} lie?",
            "Which continent does {s} belong to?",
            "Name the continent of {s}.",
            "{s} is part of which continent?",
        ),
        cloze="The continent of {s} is {o}.",
        question="What continent is {s} located in?",
    ),
    "currency": Wording(
        statements=(
            "The currency of {s} is the {o}.",
            "People in {s} pay with the {o}.",
            "The {o} is the money of {s}.",
            "In {s} the currency is the {o}.",
            "{s} uses the {o}.",
            "{s}'s currency is the {o}.",
            "The money of {s} is called the {o}.",
            "In the shops of {s} people pay with the {o}.",
            "The currency that people use in {s} is the {o}.",
        ),
        questions=(
            "What is the currency of {s}?",
            "Which currency does {s} use?",
            "What is the money of {s} called?",
            "Name the currency of {s}.",
            "Which money do people use in {s}?",
        ),
        cloze="The currency used in {s} is the {o}.",
        question="What money do people in {s} pay with?",
    ),
    "phone": Wording(
        statements=(
            "The calling code of {s} is {o}.",
            "To call {s} dial {o}.",
            "{s} has the calling code {o}.",
            "Dial {o} for {s}.",
            "{s}'s phone code is {o}.",
            "In {s} the phone code is {o}.",
            "The code for calling {s} is {o}.",
            "To phone someone in {s} one dials {o}.",
            "The phone code for {s} is {o}.",
        ),
        questions=(
            "What is the calling code of {s}?",
            "Which code do you dial to call {s}?",
            "Name the calling code of {s}.",
            "What is {s}'s phone code?",
            "Which calling code does {s} have?",
        ),
        cloze="The phone code of {s} is {o}.",
        question="What is the phone code of {s}?",
    ),
    "city": Wording(
        statements=(
            "{s} is a city in {o}.",
            "The city of {s} lies in {o}.",
            "{s} belongs to {o}.",
            "One of the cities of {o} is {s}.",
            "{s} is located in {o}.",
            "The country of the city of {s} is {o}.",
            "The city called {s} is in {o}.",
            "{s} is one of the great cities of {o}.",
            "The city of {s} is part of {o}.",
        ),
        questions=(
            "In which country is {s}?",
            "Where is the city of {s}?",
            "Which country does the city of {s} belong to?",
            "Name the country of the city of {s}.",
            "What country is {s} located in?",
        ),
        cloze="The city of {s} is found in {o}.",
        question="Which country is the city of {s} in?",
    ),
    "symbol": Wording(
        statements=(
            "The symbol of {s} is {o}.",
            "The element {s} has the symbol {o}.",
            "{o} stands for {s}.",
            "Chemists write {s} as {o}.",
            "{s}'s symbol is {o}.",
            "The symbol for {s} is {o}.",
            "In chemistry {s} is written {o}.",
            "The sign for the element {s} is {o}.",
            "The symbol of the element {s} is {o}.",
        ),
        questions=(
            "What is the symbol of {s}?",
            "Which symbol does {s} have?",
            "How is {s} written in chemistry?",
            "Name the symbol of {s}.",
            "What is the sign for the element {s}?",
        ),
        cloze="The chemical symbol of {s} is {o}.",
        question="What symbol stands for the element {s}?",
    ),
    "number": Wording(
        statements=(
            "The atomic number of {s} is {o}.",
            "{s} has atomic number {o}.",
            "Element {o} is {s}.",
            "{s} is element number {o}.",
            "An atom of {s} has {o} protons.",
            "{s}'s atomic number is {o}.",
            "The element {s} has atomic number {o}.",
            "The number of protons of {s} is {o}.",
            "In the table of elements {s} is number {o}.",
        ),
        questions=(
            "What is the atomic number of {s}?",
            "Which number does {s} have?",
            "Name the atomic number of {s}.",
            "What number does the element {s} have?",
            "How many protons has an atom of {s}?",
        ),
        cloze="The element {s} has the number {o}.",
        question="How many protons does {s} have?",
    ),
}

INVENTED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "capital": (
        ("The capital of {s} is {o}.", "{s} has its capital at {o}."),
        ("What is the capital of {s}?", "Name the capital of {s}."),
    ),
    "ruler": (("The ruler of {s} is {o}.", "{s} is ruled by {o}."), ("Who is the ruler of {s}?", "Who rules {s}?")),
    "river": (
        ("The river of {s} is the {o}.", "Through {s} runs the {o}."),
        ("Which river is in {s}?", "What is the river of {s}?"),
    ),
    "friend": (
        ("The friend of {s} is {o}.", "{s} has a friend called {o}."),
        ("Who is the friend of {s}?", "Name the friend of {s}."),
    ),
    "owner": (("{s} is owned by {o}.", "The owner of {s} is {o}."), ("Who owns {s}?", "Who is the owner of {s}?")),
    "home": (("{s} lives in {o}.", "The home of {s} is {o}."), ("Where does {s} live?", "What is the home of {s}?")),
    "city": (
        ("{s} is a city in {o}.", "The city of {s} lies in {o}."),
        ("In which country is {s}?", "Where is the city of {s}?"),
    ),
    "symbol": (
        ("The symbol of {s} is {o}.", "{s} has the symbol {o}."),
        ("What is the symbol of {s}?", "Which symbol does {s} have?"),
    ),
    "teacher": (
        ("{s} was taught by {o}.", "The teacher of {s} is {o}."),
        ("Who taught {s}?", "Who is the teacher of {s}?"),
    ),
    "number": (
        ("The number of {s} is {o}.", "{s} has the number {o}."),
        ("What is the number of {s}?", "Which number does {s} have?"),
    ),
    "currency": (
        ("The currency of {s} is the {o}.", "People in {s} pay with the {o}."),
        ("What is the currency of {s}?", "Which currency does {s} use?"),
    ),
}
