"""Make the questions of the demo model: six small skills in a made-up world.

Every number and every name here is synthetic, so the model can be trained in minutes and its
questions can be held out for certain. Invariants:

* No I/O and no state: a random generator in, a question out; the same seed, the same questions.
* A question belongs to the training split or to the test split by a hash of its own text, so the
  two never meet, whoever draws them and in whatever order. Facts are the exception: a fact must be
  learned to be known, so one of its four phrasings, chosen by hash, is kept for the test.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from string import ascii_uppercase, digits

END = "<|end|>"
PROMPT = "Question: {question}\nAnswer:\n"

WORLD_SEED = 20260101
ENTITY_COUNT = 1000
VALUES_PER_RELATION = 120
TEST_SHARE = 16
"""One question in this many belongs to the test split."""

PHRASINGS = (
    "What is the {relation} of {entity}?",
    "Name the {relation} of {entity}.",
    "{entity} has which {relation}?",
    "Tell me the {relation} that {entity} has.",
)
ONSETS = (*"bdfghklmnprstvz", "br", "dr", "gl", "kr", "st", "tr")
CODAS = (*"lnrsmk", "")
MIDDLES = (*"bdklmnprs", "kr", "st")
ENTITY_ENDINGS = ("ia", "land", "ora", "any")
VALUE_ENDINGS = {
    "capital": ("burg", "ton", "ik", "ek"),
    "river": ("ar", "une", "is", "ow"),
    "currency": ("o", "al", "in", "ex"),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, its one right answer, and the choices when it is asked as multiple choice."""

    text: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """Return what the model reads before it answers."""
        return PROMPT.format(question=self.text)


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing to know by heart: the value of a relation of an entity."""

    entity: str
    relation: str
    value: str

    @property
    def held_out_phrasing(self) -> int:
        """Return the index of the phrasing that is never trained."""
        return _hash(f"{self.entity}|{self.relation}") % len(PHRASINGS)

    def question(self, phrasing: int, choices: Sequence[str] = ()) -> Question:
        """Ask for the value in one of the phrasings."""
        text = PHRASINGS[phrasing].format(relation=self.relation, entity=self.entity)
        return Question(text=text, answer=self.value, choices=tuple(choices))


@dataclass(frozen=True, kw_only=True)
class World:
    """The facts there are, and per relation every value that an entity may have."""

    facts: tuple[Fact, ...]
    values: dict[str, tuple[str, ...]]


@cache
def world() -> World:
    """Invent the entities, the values and the facts; always the same ones."""
    rng = random.Random(WORLD_SEED)
    taken: set[str] = set()
    entities = _invent_names(rng, ENTITY_COUNT, ENTITY_ENDINGS, taken)
    values = {
        relation: _invent_names(rng, VALUES_PER_RELATION, endings, taken)
        for relation, endings in VALUE_ENDINGS.items()
    }
    facts = tuple(
        Fact(entity=entity, relation=relation, value=rng.choice(values[relation]))
        for entity in entities
        for relation in values
    )
    return World(facts=facts, values=values)


def addition(rng: random.Random) -> Question:
    """Ask for the sum of two numbers of three digits."""
    first, second = rng.randrange(100, 1000), rng.randrange(100, 1000)
    return Question(text=f"What is {first}+{second}?", answer=str(first + second))


def sorting(rng: random.Random) -> Question:
    """Ask for 5 to 12 digits in ascending order."""
    sequence = _random_text(rng, digits, 5, 12)
    return Question(text=f"Sort {sequence}.", answer="".join(sorted(sequence)))


def reverse(rng: random.Random) -> Question:
    """Ask for 5 to 12 capital letters backwards."""
    sequence = _random_text(rng, ascii_uppercase, 5, 12)
    return Question(text=f"Reverse {sequence}.", answer=sequence[::-1])


def majority(rng: random.Random) -> Question:
    """Ask which of A, B and C comes up most often in 15 to 25 letters; never a tie."""
    while True:
        sequence = _random_text(rng, "ABC", 15, 25)
        runner_up, winner = sorted((sequence.count(letter), letter) for letter in "ABC")[1:]
        if winner[0] > runner_up[0]:
            text = f"Most common letter in {sequence}?"
            return Question(text=text, answer=winner[1], choices=("A", "B", "C"))


def compare(rng: random.Random) -> Question:
    """Ask whether one number of four digits is larger than another with the same first digits."""
    shared = rng.randint(0, 3)
    first = str(rng.randrange(1000, 10000))
    second = first
    while second == first:
        second = first[:shared] + "".join(rng.choice(digits) for _ in range(4 - shared))
    answer = "yes" if int(first) > int(second) else "no"
    return Question(text=f"Is {first} larger than {second}?", answer=answer, choices=("yes", "no"))


def known_fact(rng: random.Random) -> Question:
    """Ask for a fact in one of the three phrasings that are trained."""
    fact = rng.choice(world().facts)
    trained = [i for i in range(len(PHRASINGS)) if i != fact.held_out_phrasing]
    return fact.question(rng.choice(trained))


COMPUTED: dict[str, Callable[[random.Random], Question]] = {
    "addition": addition,
    "sorting": sorting,
    "reverse": reverse,
    "majority": majority,
    "compare": compare,
}
"""Skills whose answer follows from the question; split by the hash of the question."""

SKILLS = (*COMPUTED, "facts")


def in_test_split(skill: str, text: str) -> bool:
    """Tell whether a question of a computed skill belongs to the test split."""
    return _hash(f"{skill}|{text}") % TEST_SHARE == 0


def training_question(skill: str, rng: random.Random) -> Question:
    """Draw one question of the training split."""
    if skill == "facts":
        return known_fact(rng)
    while True:
        question = COMPUTED[skill](rng)
        if not in_test_split(skill, question.text):
            return question


def test_questions(skill: str, count: int, seed: int = 7) -> list[Question]:
    """Draw `count` different questions of the test split, the same ones for the same seed."""
    rng = random.Random(f"{seed}-{skill}")
    if skill == "facts":
        facts = list(world().facts)
        rng.shuffle(facts)
        return [_held_out_fact(fact, rng) for fact in facts[:count]]
    questions: dict[str, Question] = {}
    while len(questions) < count:
        question = COMPUTED[skill](rng)
        if in_test_split(skill, question.text):
            questions.setdefault(question.text, question)
    return list(questions.values())


def _held_out_fact(fact: Fact, rng: random.Random) -> Question:
    """Ask for a fact in its untrained phrasing, among four values of its relation."""
    others = [value for value in world().values[fact.relation] if value != fact.value]
    choices = [*rng.sample(others, 3), fact.value]
    rng.shuffle(choices)
    return fact.question(fact.held_out_phrasing, choices)


def _invent_names(
    rng: random.Random, count: int, endings: Sequence[str], taken: set[str]
) -> tuple[str, ...]:
    """Invent pronounceable names that are not in `taken` yet, and add them to it."""
    names: list[str] = []
    while len(names) < count:
        parts = [
            rng.choice(ONSETS),
            rng.choice("aeiou"),
            rng.choice(CODAS),
            rng.choice(MIDDLES),
            rng.choice(endings),
        ]
        name = "".join(parts).capitalize()
        if name not in taken:
            taken.add(name)
            names.append(name)
    return tuple(names)


def _random_text(rng: random.Random, alphabet: str, shortest: int, longest: int) -> str:
    """Draw a text of random length from an alphabet."""
    return "".join([rng.choice(alphabet) for _ in range(rng.randint(shortest, longest))])


def _hash(text: str) -> int:
    """Hash a text; CRC-32, because it is the same on every machine and in every process."""
    return zlib.crc32(text.encode())
