"""What is killed and when: drawn by chance from a seed.

Invariant: equal seeds give equal draws, and no kind of moment or target is left out.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

START, STEP, SAVE, EVALUATION = MOMENTS = ("start", "step", "save", "evaluation")
RANK, HOST, AGENT = TARGETS = ("rank", "host", "agent")

# Chosen: an attempt gets over the next checkpoint or not, about equally often.
MOST_STEPS, MOST_SAVES, MOST_EVALUATIONS = 9, 2, 3


@dataclass(frozen=True)
class Draw:
    """One kill.

    Attributes:
        moment: what the run is to be doing.
        target: what dies.
        count: the steps to wait for after the start, or which save or evaluation it is to be.
        part: how far into the moment, from 0 to 1 of its usual length.
        pick: which of several ranks, hosts or agents, from 0 to 1.
    """

    moment: str
    target: str
    count: int
    part: float
    pick: float


def _complete(generator: random.Random, moment: str, target: str) -> Draw:
    most = {STEP: MOST_STEPS, SAVE: MOST_SAVES, EVALUATION: MOST_EVALUATIONS}.get(moment, 1)
    count, part = generator.randint(1, most), generator.random()
    return Draw(moment, target, count, part, generator.random())


def ten_draws(generator: random.Random) -> list[Draw]:
    """Ten of the twelve pairs of moment and target, each at most once, in a random order.

    The two left out differ in both: every moment occurs at least twice, every target three times.
    """
    left_out = set(
        zip(generator.sample(MOMENTS, 2), generator.sample(TARGETS, 2), strict=True),
    )
    pairs = [pair for pair in itertools.product(MOMENTS, TARGETS) if pair not in left_out]
    generator.shuffle(pairs)
    return [_complete(generator, moment, target) for moment, target in pairs]


def rank_draws(generator: random.Random, moments: Sequence[str]) -> list[Draw]:
    """One killed rank for each of the moments, in a random order."""
    order = generator.sample(list(moments), len(moments))
    return [_complete(generator, moment, RANK) for moment in order]
