"""The task is to apply two operations to a list of words, one after the other. A rule grades the last list.

A prompt is `operation operation word word word`, a completion

    remark operation w w w  remark operation w w w  END

where the policy names the operation that it is about to apply, and writes down the list that results. A *remark* is a
word of a class of its own that does not matter to the reward, as discourse words do not. Words and remarks follow
Zipf's law, so most of the vocabulary is rare: rare words must be copied exactly, and rare remarks are sampled all the
time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.workloads import zipf_weights

# An operation has, for each position of the list after it, the position in the list before it.
OPERATIONS = {"reverse": (2, 1, 0), "rotate": (1, 2, 0), "swap": (1, 0, 2)}
LIST = 3
END_ID, PAD_ID = 0, 1
FIRST_OPERATION = 2
FIRST_WORD = FIRST_OPERATION + len(OPERATIONS)
PROMPT_LENGTH = 2 + LIST
ANSWER_LENGTH = 2 * (2 + LIST) + 1
COMPLETION_LENGTH = ANSWER_LENGTH + 1  # A completion that goes wrong may be longer.


@dataclass(frozen=True)
class Vocabulary:
    """The tokens are END, PAD, the operations, the words and the remarks, with the most frequent of each first."""

    words: int
    remarks: int

    @property
    def first_remark(self) -> int:
        return FIRST_WORD + self.words

    @property
    def size(self) -> int:
        return self.first_remark + self.remarks


@dataclass(frozen=True)
class Problems:
    """N problems: their prompts [N, PROMPT_LENGTH], and the right lists [N, LIST] after both operations."""

    prompts: Tensor
    answers: Tensor

    def repeat(self, times: int) -> Problems:
        """Repeat each problem `times` times in a row."""
        return Problems(self.prompts.repeat_interleave(times, 0), self.answers.repeat_interleave(times, 0))


def draw_problems(vocabulary: Vocabulary, count: int, generator: torch.Generator) -> Problems:
    """Draw problems, each with a list of distinct words and two operations."""
    weights = zipf_weights(vocabulary.words).expand(count, -1)
    words = FIRST_WORD + torch.multinomial(weights, LIST, generator=generator)
    operations = torch.randint(len(OPERATIONS), (count, 2), generator=generator)
    return Problems(torch.cat([FIRST_OPERATION + operations, words], 1), applied(words, operations)[1])


def applied(words: Tensor, operations: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lists [N, LIST] after the first and after the second of the operations [N, 2]."""
    permutations = torch.tensor(list(OPERATIONS.values()))[operations]  # [N, 2, LIST]
    first = words.gather(1, permutations[:, 0])
    return first, first.gather(1, permutations[:, 1])


def draw_demonstrations(
    vocabulary: Vocabulary, problems: Problems, carelessness: float, generator: torch.Generator
) -> Tensor:
    """Draw a completion [N, ANSWER_LENGTH] of each problem by a careless teacher.

    With probability `carelessness` the teacher guesses an operation, and then names and applies it without fault. What
    reinforcement can teach is to choose the right operation, and to copy rare words. Remarks follow Zipf's law.
    """
    operations = problems.prompts[:, :2] - FIRST_OPERATION
    guesses = torch.randint(len(OPERATIONS), operations.shape, generator=generator)
    operations = torch.where(torch.rand(operations.shape, generator=generator) < carelessness, guesses, operations)
    weights = zipf_weights(vocabulary.remarks)
    drawn = torch.multinomial(weights, operations.numel(), replacement=True, generator=generator)
    spoken = torch.stack([vocabulary.first_remark + drawn.view_as(operations), FIRST_OPERATION + operations], -1)
    first, second = applied(problems.prompts[:, 2:], operations)
    end = operations.new_full((len(operations), 1), END_ID)
    return torch.cat([spoken[:, 0], first, spoken[:, 1], second, end], 1)


def rewards(vocabulary: Vocabulary, problems: Problems, completions: Tensor) -> Tensor:
    """Return [N] float32: 1 if the list just before the first END is the right one and follows an operation, else 0.

    What comes before that, even the first list, does not matter.
    """
    ends = completions == END_ID
    end = ends.int().argmax(1)
    tail = completions.gather(1, (end - LIST - 1).clamp(min=0)[:, None] + torch.arange(LIST + 1))
    named = (tail[:, 0] >= FIRST_OPERATION) & (tail[:, 0] < FIRST_WORD)
    return (named & (tail[:, 1:] == problems.answers).all(1) & ends.any(1) & (end > LIST)).float()
