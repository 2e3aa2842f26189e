"""Questions about long texts, in the manner of RULER (Hsieh et al., 2024): needle, variable tracking, common words.

Everything is drawn from a seed; any tokenizer will do. A question is built as long as its length allows.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from puzzle_nas.errors import DataError

SPARE_TOKENS = 8
"""Tokens that a model may write besides the answer."""
HAYSTACK = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_WORDS = (
    "anchor apple arrow badge basket beach bell bird blanket board bottle bridge brush bucket butter button cabin "
    "camera candle carpet castle chain chair cherry circle clock cloud coast coffee corner cotton cradle crown "
    "curtain desert dinner dragon drawer engine farmer feather fence finger flower forest garden ginger glass glove "
    "grain guitar hammer harbor helmet honey island jacket jungle kettle kitchen ladder lemon letter lizard magnet "
    "marble market meadow mirror monkey mountain needle ocean onion orange oyster palace paper parrot pencil pepper "
    "piano pillow pirate planet pocket potato prison puzzle rabbit ribbon river rocket saddle salad school shadow "
    "silver snake soldier spider spoon station statue stone storm sugar summer table teapot temple thunder ticket "
    "tiger timber tower trumpet tunnel turtle valley velvet village violin wagon walnut window winter wizard "
)
WORDS = tuple(_WORDS.split())
"""None is part of another."""
CHAIN = 4
"""Variables that hold the same value, for variable tracking."""
COMMON = 3
"""Words that come often, for common words."""


@dataclass(frozen=True)
class Question:
    """A prompt and the strings that a right continuation holds."""

    prompt: str
    answers: tuple[str, ...]
    answer_tokens: int
    """How many tokens a model may write."""

    def score(self, continuation: str) -> float:
        """Share of the answers that are found."""
        return sum(answer in continuation for answer in self.answers) / len(self.answers)


def needle(draw: random.Random, size: int) -> tuple[str, tuple[str, ...]]:
    """One sentence with a number among `size` sentences that say nothing."""
    key, value = draw.choice(WORDS), str(draw.randrange(1_000_000, 10_000_000))
    lines = [HAYSTACK[place % len(HAYSTACK)] for place in range(size)]
    lines.insert(draw.randrange(size + 1), f"One of the special magic numbers for {key} is: {value}.")
    return (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the number afterwards.\n{' '.join(lines)}\nWhat is the special magic number for {key} mentioned in the "
        f"provided text? The special magic number for {key} mentioned in the provided text is",
        (value,),
    )


def variable_tracking(draw: random.Random, size: int) -> tuple[str, tuple[str, ...]]:
    """A value that is handed on from variable to variable, scattered in order among `size` sentences."""
    names: list[str] = []
    while len(names) < CHAIN:
        name = "".join(draw.choices(string.ascii_uppercase, k=5))
        names += [name] if name not in names else []
    value = str(draw.randrange(10_000, 100_000))
    assignments = [f"VAR {names[0]} = {value}."]
    assignments += [f"VAR {later} = VAR {earlier}." for earlier, later in itertools.pairwise(names)]
    lines = [HAYSTACK[place % len(HAYSTACK)] for place in range(size)]
    places = sorted(draw.randrange(size + 1) for _ in assignments)
    for place, line in reversed(list(zip(places, assignments, strict=True))):
        lines.insert(place, line)
    return (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
        f"{' '.join(lines)}\nQuestion: Find all variables that are assigned the value {value} in the text above. "
        f"Answer: According to the chain(s) of variable assignment in the text above, {CHAIN} variables are assigned "
        f"the value {value}, they are:",
        tuple(names),
    )


def common_words(draw: random.Random, size: int) -> tuple[str, tuple[str, ...]]:
    """A numbered list of 8 + `size` words, half of them the same few, the others spread over all words."""
    size += 8
    order = draw.sample(WORDS, len(WORDS))
    common, rare = order[:COMMON], order[COMMON:]
    words = [common[place % COMMON] for place in range(size // 2)]
    words += [rare[place % len(rare)] for place in range(size - len(words))]
    draw.shuffle(words)
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{numbered}\nQuestion: What are the {COMMON} most common words in the above list? Answer: "
        f"The top {COMMON} words that appear most often in the list are:",
        tuple(common),
    )


KINDS: dict[str, Callable[[random.Random, int], tuple[str, tuple[str, ...]]]] = {
    "needle": needle,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
}


def question(kind: str, number: int, length: int, tokenizer: Any, seed: int) -> Question:
    """The question of a kind and number that fills `length` tokens best, answer included.

    Raises:
        DataError: even the shortest is longer.
    """

    def made(size: int) -> tuple[str, tuple[str, ...]]:
        return KINDS[kind](random.Random(f"{seed} {kind} {number} {length}"), size)

    answers = made(0)[1]
    answer_tokens = len(tokenizer.encode(" " + ", ".join(answers), add_special_tokens=False)) + SPARE_TOKENS

    def fits(size: int) -> bool:
        return len(tokenizer.encode(made(size)[0], verbose=False)) + answer_tokens <= length

    if not fits(0):
        raise DataError(f"No {kind.replace('_', ' ')} question fits into {length} tokens of this tokenizer.")
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Question(made(low)[0], answers, answer_tokens)
