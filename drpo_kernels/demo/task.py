"""The task: two-digit additions as text, a character tokenizer, and the rule that rewards a completion.

Answers are written units first ("58+67=521."). Each digit then follows from two digits and a carry, which a small model
learns much sooner.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

END, PAD = ".", "_"
ALPHABET = "0123456789+=" + END + PAD
IDS = {character: index for index, character in enumerate(ALPHABET)}
END_ID, PAD_ID = IDS[END], IDS[PAD]

PROMPT_LENGTH = len("00+00=")
COMPLETION_LENGTH = len("891" + END)


@dataclass(frozen=True)
class Problem:
    """The question left + right = ?, with both numbers in [0, 100)."""

    left: int
    right: int

    @property
    def prompt(self) -> str:
        """The question in PROMPT_LENGTH characters, so that a batch of prompts needs no padding."""
        return f"{self.left:02d}+{self.right:02d}="

    @property
    def answer(self) -> str:
        """The only completion that is rewarded. END closes it."""
        return str(self.left + self.right)[::-1] + END


def split_problems(seed: int, held_out: int) -> tuple[list[Problem], list[Problem]]:
    """All 10,000 problems in a seeded order, as (training problems, held-out problems)."""
    problems = [Problem(left, right) for left in range(100) for right in range(100)]
    random.Random(seed).shuffle(problems)
    return problems[held_out:], problems[:held_out]


def encode(texts: Sequence[str], length: int) -> Tensor:
    """Texts of at most `length` characters -> ids [N, length], padded on the right with PAD."""
    return torch.tensor([[IDS[character] for character in text.ljust(length, PAD)] for text in texts])


def decode(ids: Tensor) -> list[str]:
    """Ids [N, L] -> the texts up to and including their first END, or whole texts without one."""
    texts = ("".join(ALPHABET[index] for index in row) for row in ids.tolist())
    return [text[: text.find(END) + 1] or text for text in texts]


def until_end(ids: Tensor, end_id: int = END_ID) -> Tensor:
    """bool [N, L]: which of the sampled tokens belong to the completion, that is, up to and including the first END."""
    ended = (ids == end_id).long()
    return ended.cumsum(-1) - ended == 0


def reward(problem: Problem, completion: str) -> float:
    """1 for exactly the right answer, properly ended; 0 for anything else."""
    return float(completion == problem.answer)


def rewards(problems: Sequence[Problem], completions: Tensor) -> Tensor:
    """Rewards [N] of N completions [N, L], one per problem, on the CPU."""
    return torch.tensor([reward(*pair) for pair in zip(problems, decode(completions), strict=True)])
