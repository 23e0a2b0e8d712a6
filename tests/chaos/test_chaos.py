"""Ranks, agents and whole hosts die at random moments; the run ends as if nothing had happened."""

import dataclasses
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from llama_lib.cluster.protocol import GRACE_SECONDS, HOST_LOST_SECONDS, STUCK_SECONDS
from tests.chaos.draws import MOMENTS, RANK, SAVE, START, STEP, TARGETS, rank_draws, twenty_draws
from tests.chaos.harness import Kill, Rhythm
from tests.chaos.places import TestHosts
from tests.chaos.report import table
from tests.chaos.run_files import Ending, RunFiles
from tests.chaos.runs import (
    SCRIPT,
    THREADS,
    Disturbed,
    Work,
    differences,
    disturb_here,
    launch_words,
    prepare_data,
    train_undisturbed,
)
from tests.chaos.twenty import twenty_kills
from tests.cluster import hosts
from tests.cluster.hosts import Cluster

needs_hosts = pytest.mark.skipif(hosts.missing() is not None, reason=str(hosts.missing()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return prepare_data(tmp_path_factory.mktemp("chaos"))


def test_draws_leave_nothing_out() -> None:
    for seed in range(50):
        halves = twenty_draws(random.Random(seed))
        for draws in halves:
            moments = Counter(draw.moment for draw in draws)
            targets = Counter(draw.target for draw in draws)
            assert set(moments) == set(MOMENTS) and min(moments.values()) >= 2
            assert set(targets) == set(TARGETS) and min(targets.values()) >= 3
            for target in TARGETS:  # the first and the last of its kind are both hit
                picks = sorted(draw.pick for draw in draws if draw.target == target)
                assert 0 <= picks[0] < 0.5 <= picks[-1] < 1
        assert [len(draws) for draws in halves] == [10, 10]
        assert len({(draw.moment, draw.target) for draws in halves for draw in draws}) == 12
        assert halves == twenty_draws(random.Random(seed))
    assert twenty_draws(random.Random(1)) != twenty_draws(random.Random(2))


def test_every_difference_is_found() -> None:
    expected = Ending(
        {"model/a.safetensors": "1"}, {1: 2.0, 2: 1.5}, {2: {"step": 2, "losses": {}}}
    )
    same = Disturbed([], [], expected, {1: {2.0}, 2: {1.5}}, [], 1.0)
    assert differences(expected, same) == []

    def found(**changed: object) -> list[str]:
        ending = dataclasses.replace(expected, **changed)  # type: ignore[arg-type]
        return differences(expected, dataclasses.replace(same, ending=ending))

    assert found(hashes={"model/a.safetensors": "2"}) == ["model/a.safetensors differs"]
    assert found(hashes={}) == ["model/a.safetensors differs"]
    assert found(losses={1: 2.0}) and found(losses={1: 2.0, 2: 1.5, 3: 1.0})
    assert found(held_out={}) == ["step 2: held-out losses differ"]
    assert found(held_out={2: {"step": 2}}) == ["step 2: held-out losses differ"]
    # A step that was done twice, once with another loss, and then cut from the records.
    again = dataclasses.replace(same, losses={1: {2.0, 2.1}, 2: {1.5}})
    assert [line[:6] for line in differences(expected, again)] == ["step 1"]
    left = dataclasses.replace(same, left=["python pretrain.py"])
    assert differences(expected, left) == ["still running: python pretrain.py"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "moments", [(SAVE,), pytest.param((START, STEP, SAVE), marks=pytest.mark.full)]
)
def test_killed_ranks_of_one_host(
    moments: tuple[str, ...], data: tuple[Path, Path], tmp_path: Path
) -> None:
    """kill -9 of a rank during the start, in a step and in a save, under `launch` on this host."""
    work = Work(*data, Rhythm(steps=24, save_interval=6, eval_interval=5), ("-p", "gemini"))
    expected, usual = train_undisturbed(work, tmp_path / "undisturbed")
    draws = rank_draws(random.Random(3), moments)
    found = disturb_here(work, usual, draws, tmp_path / "disturbed")
    assert differences(expected, found) == []
    # A start that was over too soon is hit in its first steps, and another one is hit then.
    assert set(moments) <= {kill.moment for kill in found.kills}
    assert len(found.kills) - len(draws) <= 1
    assert all(kill.target.startswith(RANK) for kill in found.kills)
    assert all(made_up_for(kill) for kill in found.kills)


def made_up_for(kill: Kill) -> bool:
    return kill.resumed_at is not None and kill.seconds is not None and (kill.steps_lost or 0) >= 0


@needs_hosts
@pytest.mark.distributed
@pytest.mark.full
def test_twenty_kills_on_three_hosts(tmp_path: Path) -> None:
    result = twenty_kills(tmp_path, seed=20)
    totals = result["totals"]
    print(table(result))
    assert totals["differences"] == 0, table(result)
    assert totals["kills"] >= 20
    assert min(totals["moments"][moment] for moment in MOMENTS) >= 3
    assert min(totals["targets"][target] for target in TARGETS) >= 3


@needs_hosts
@pytest.mark.distributed
@pytest.mark.full
def test_a_link_cut_in_mid_run(data: tuple[Path, Path], tmp_path: Path) -> None:
    """Both sides end by themselves in time; with the link mended the run goes on where it was."""
    work = Work(*data, Rhythm(steps=60, save_interval=8, eval_interval=5), ("-p", "zero2"))
    expected, _ = train_undisturbed(work, tmp_path / "undisturbed")
    files, limit = RunFiles(tmp_path / "cut"), HOST_LOST_SECONDS + GRACE_SECONDS + STUCK_SECONDS
    (tmp_path / "hosts").mkdir()
    with Cluster(tmp_path / "hosts") as cluster:
        options = ["--hostfile", str(cluster.hostfile()), "--nproc_per_node", "1"]
        command = ["python", *launch_words(options, work, files)]
        job = TestHosts(cluster, SCRIPT)
        launcher = cluster.start(command, 0, **THREADS)
        while files.last_step() < 20:
            assert launcher.poll() is None, cluster.output(0).read_text()
            time.sleep(0.01)
        assert sorted(job.find().ranks) == [0, 1]
        cluster.cut(1)
        cut = time.monotonic()
        assert launcher.wait(limit) == 1, cluster.output(0).read_text()
        said = cluster.output(0).read_text()
        assert "node2" in said.splitlines()[-1], said
        while job.everything_left():
            assert time.monotonic() < cut + limit, job.everything_left()
            time.sleep(0.1)
        files.remember_losses()

        cluster.mend(1)
        outcome = cluster.run(command, 0, **THREADS)
        assert outcome.code == 0, outcome.said
        assert "resumed " in outcome.said
        files.remember_losses()
        left = job.everything_left()
    found = Disturbed(command, [], files.final(60), files.losses, left, 0.0)
    assert differences(expected, found) == []
