"""Twenty kills: ten with checkpoints written at once, ten with --async_save.

Invariant: what is hit and when follows from the seed alone.
"""

import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.chaos.draws import Draw, twenty_draws
from tests.chaos.harness import Rhythm
from tests.chaos.report import Part, report
from tests.chaos.runs import (
    HOSTS_IN_FILE,
    Work,
    differences,
    disturb_hosts,
    prepare_data,
    train_undisturbed,
)
from tests.cluster.hosts import Cluster

# Ten kills each. An attempt gets on by twelve steps at most before it is hit (draws.py).
RHYTHM = Rhythm(steps=120, save_interval=6, eval_interval=4)
VARIANTS = (("-p", "gemini"), ("-p", "zero2", "--async_save"))


def twenty_kills(folder: Path, seed: int) -> dict[str, Any]:
    """Both variants at the same time, each on hosts of its own."""
    begun = time.time()
    halves = twenty_draws(random.Random(seed))
    data = prepare_data(folder / "data")
    with ProcessPoolExecutor(len(VARIANTS), get_context("spawn")) as pool:
        started = [
            pool.submit(_ten_kills, folder / f"{number}", Work(*data, RHYTHM, options), draws)
            for number, (options, draws) in enumerate(zip(VARIANTS, halves, strict=True))
        ]
        parts = [future.result() for future in started]
    return report(parts, seed, str(folder), begun)


def _ten_kills(folder: Path, work: Work, draws: Sequence[Draw]) -> Part:
    expected, usual = train_undisturbed(work, folder / "undisturbed")
    (folder / "hosts").mkdir()
    with Cluster(folder / "hosts", size=HOSTS_IN_FILE + 1) as cluster:
        found = disturb_hosts(work, usual, draws, folder / "disturbed", cluster)
    return Part(work, usual, found, differences(expected, found))
