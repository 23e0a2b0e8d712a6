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


def _complete(generator: random.Random, pairs: Sequence[tuple[str, str]]) -> list[Draw]:
    picks = {
        target: _spread(generator, [to for _, to in pairs].count(target)) for target in TARGETS
    }
    most = {STEP: MOST_STEPS, SAVE: MOST_SAVES, EVALUATION: MOST_EVALUATIONS}
    draws = []
    for moment, target in pairs:
        count, part = generator.randint(1, most.get(moment, 1)), generator.random()
        draws.append(Draw(moment, target, count, part, picks[target].pop()))
    return draws


def _spread(generator: random.Random, number: int) -> list[float]:
    """Numbers from 0 to 1, one in each of as many equal parts, in a random order."""
    spread = [(part + generator.random()) / number for part in range(number)]
    generator.shuffle(spread)
    return spread


def twenty_draws(generator: random.Random) -> list[list[Draw]]:
    """Two halves, each ten of the twelve pairs of moment and target in a random order.

    What a half leaves out differs in both, so that in each half every moment occurs at least twice
    and every target three times; the other half has it.
    """
    halves: list[list[Draw]] = []
    left_out: set[tuple[str, str]] = set()
    while len(halves) < 2:
        few = set(zip(generator.sample(MOMENTS, 2), generator.sample(TARGETS, 2), strict=True))
        if few & left_out:
            continue
        left_out |= few
        pairs = [pair for pair in itertools.product(MOMENTS, TARGETS) if pair not in few]
        generator.shuffle(pairs)
        halves.append(_complete(generator, pairs))
    return halves


def rank_draws(generator: random.Random, moments: Sequence[str]) -> list[Draw]:
    """One killed rank for each of the moments, in a random order."""
    order = generator.sample(list(moments), len(moments))
    return _complete(generator, [(moment, RANK) for moment in order])
