"""What is proposed when memory does not suffice."""

from dataclasses import replace
from itertools import pairwise

import pytest

from llama_lib.config import parse_options
from llama_lib.layout import Layout, layout_problems
from llama_lib.models import model_shape
from llama_lib.planner.advice import (
    _changes,
    change_words,
    cheaper,
    offload_warning,
    options_of,
    out_of_memory_text,
)
from llama_lib.planner.hardware import GIB, cpu_host, known_gpu, machines
from llama_lib.planner.job import Job, job_of
from llama_lib.planner.memory import memory
from llama_lib.planner.roofline import step_time
from llama_lib.planner.search import limits, refusals

A100 = machines(known_gpu("a100-80gb"), 8)
ROOM = limits(A100, None).device


def job(model="7b", plugin="zero2", world=8, zero=2, rows=16, tp=1, pp=1, **changes) -> Job:
    values = {
        "shape": model_shape(model),
        "layout": Layout(
            plugin,
            world,
            tp,
            pp,
            zero_stage=zero,
            model_chunks=changes.pop("model_chunks", 1),
        ),
        "batch_size": rows,
        "accumulation": 1,
        "microbatch_size": rows if pp == 1 else 1,
        "max_length": 4096,
        "precision": "bf16",
        "gpus_per_host": world,
    }
    return Job(**values | changes)


JOBS = [
    job(),
    job(plugin="gemini", zero=3, rows=8),
    job(plugin="gemini_auto", zero=3, rows=32),
    job("13b", "zero2_cpu", rows=2, recompute="full"),
    job("70b", "hybrid_parallel", zero=0, tp=4, pp=2, recompute="full", chunked_loss=False),
    job("7b", "hybrid_parallel", 8, 1, 16, pp=2, chunked_loss=False, model_chunks=2),
    job("13b", "gemini", world=2, zero=3, rows=1, recompute="full"),
]


@pytest.mark.parametrize("before", JOBS, ids=lambda each: each.layout.describe())
def test_changes_are_legal_and_free_what_they_say(before):
    found = cheaper(before, ROOM, where=A100)
    assert 0 < len(found) <= 3
    world = before.layout.world_size
    for advice in found:
        assert layout_problems(advice.options, world, before.shape) == []
        after = job_of(advice.options, before.shape, world, 8)
        total = memory(after).device_total
        if after.layout.plugin != "gemini_auto" and before.layout.plugin != "gemini_auto":
            assert advice.saved == memory(before).device_total - total > 0
        if after.layout.plugin != "gemini_auto":
            assert advice.suffices == (total <= ROOM)
        # What is learnt stays: the same rows in a step.
        if after.layout.pp == 1:
            assert after.tokens_per_step == before.tokens_per_step
    slowdowns = [advice.slowdown for advice in found if advice.suffices]
    assert all(a <= b + 0.01 for a, b in pairwise(slowdowns))
    assert [advice.suffices for advice in found] == sorted(
        (advice.suffices for advice in found), reverse=True
    )


def test_the_price_is_the_predicted_time():
    before = job()
    (recompute,) = [a for a in cheaper(before, ROOM, where=A100) if a.change == "-g"]
    now, then = (
        step_time(each, A100).seconds for each in (before, replace(before, recompute="full"))
    )
    assert recompute.slowdown == pytest.approx(then / now)
    assert f"{then / now - 1:+.0%}" in recompute.price
    (unpriced,) = [a for a in cheaper(before, ROOM) if a.change == "-g"]
    assert unpriced.slowdown is None and "%" not in unpriced.price


def test_flags_of_a_change_are_flags_of_the_script():
    for before in JOBS:
        for advice in cheaper(before, ROOM):
            words = advice.change.split(" (")[0].split()
            options = parse_options("pretrain", ["-d", "unused", *words])
            for name in ("plugin", "batch_size", "offload_optim_frac", "recompute", "tp", "pp"):
                section = next(
                    part
                    for part in ("model", "parallel", "training")
                    if hasattr(getattr(options, part), name)
                )
                if name in options.typed:
                    given = getattr(getattr(options, section), name)
                    assert given == getattr(getattr(advice.options, section), name)


def test_adapters_are_never_sent_where_they_are_refused():
    before = job(lora_parameters=20_000_000)
    assert job_of(options_of(before), before.shape, 8, 8).lora_parameters == pytest.approx(
        20_000_000, rel=0.2
    )
    for advice in cheaper(before, ROOM):
        parallel = advice.options.parallel
        assert not parallel.plugin.startswith("gemini") and parallel.tp == parallel.pp == 1


@pytest.mark.parametrize("before", JOBS, ids=lambda each: each.layout.describe())
def test_options_of_a_job_make_that_job(before):
    options = options_of(before)
    assert job_of(options, before.shape, before.layout.world_size, 8) == before


def test_a_host_that_is_too_small_counts():
    before = job("7b", "gemini", world=1, zero=3, rows=1)
    before = replace(before, gpus_per_host=1)
    room = memory(before).device_total
    without = cheaper(before, room, host_bytes=8 * GIB)
    assert any(not advice.suffices for advice in without)
    for advice in without:
        after = job_of(advice.options, before.shape, 1, 1)
        need = memory(after)
        assert advice.suffices == (need.device_total <= room and need.host_total <= 8 * GIB)


def test_the_text_sets_plan_and_peak_side_by_side():
    before = job()
    text = out_of_memory_text(before, 79 * GIB, 80 * GIB, where=A100)
    planned = memory(before).device_total / 2**20
    first = text.splitlines()[0]
    assert f"planned {planned:,.0f} MB" in first and "measured peak 80,896 MB" in first
    assert "81,920 MB" in first
    assert "activations" in text and "logits" in text
    assert (
        sum(line.startswith("  1) ") or line.startswith("  3) ") for line in text.splitlines()) == 2
    )
    assert "not measured" in out_of_memory_text(before, None, 80 * GIB, where=A100)


def test_a_peak_above_the_plan_is_saved_too():
    """The plan said it fits: what it missed counts for the proposals as well."""
    before = job(rows=2)
    planned = memory(before).device_total
    assert planned < ROOM
    missed = out_of_memory_text(before, planned + 60 * GIB, 80 * GIB, where=A100)
    fine = out_of_memory_text(before, None, 80 * GIB, where=A100)
    assert "not enough alone" in missed and "not enough alone" not in fine


def test_offloading_without_recomputation_is_warned_of():
    """All states on the host, and the activations still do not fit."""
    offloaded = job(plugin="gemini", zero=3, rows=4, offload_optim_frac=1.0)
    assert "add -g" in offload_warning(offloaded)
    assert offload_warning(replace(offloaded, recompute="full")) is None
    assert offload_warning(job(rows=4)) is None
    assert "add -g" in out_of_memory_text(offloaded, None, 80 * GIB, where=A100)


def test_nothing_is_proposed_that_a_switch_of_the_run_forbids():
    """--compile goes with neither gemini, nor tensor parallelism, nor selective recomputation."""
    before = job()
    compiled = replace(options_of(before), model=replace(options_of(before).model, compile=True))
    for advice in cheaper(before, ROOM, compiled):
        parallel = advice.options.parallel
        assert not parallel.plugin.startswith("gemini") and parallel.tp == 1
        assert advice.options.recompute != "selective"
    assert cheaper(before, ROOM, compiled)


LINES = [
    ("7b", 8, "-p zero2 -b 16 -l 4096"),
    ("7b", 8, "-p zero2 -b 16 -l 4096 --global_batch_tokens 1048576"),
    ("7b", 8, "-p zero2_cpu -b 6 -l 4096 --accumulation_steps 2 --recompute selective"),
    ("7b", 8, "-p gemini -b 16 -l 4096 --offload_optim_frac 0.5 --no-chunked_loss"),
    ("7b", 8, "-p hybrid_parallel --zero_stage 2 -b 16 -l 4096 --recompute none"),
    ("13b", 8, "-p hybrid_parallel --tp 2 --pp 2 --microbatch_size 4 -b 8 -l 4096"),
    (
        "13b",
        8,
        "-p hybrid_parallel --pp 2 --pp_style interleaved --num_model_chunks 2 -b 8 -l 4096"
        " --global_batch_tokens 131072",
    ),
    ("7b", 8, "-p hybrid_parallel --sp 2 --sp_mode all_to_all -b 4 -l 4096 --accumulation_steps 4"),
]


@pytest.mark.parametrize(("model", "world", "line"), LINES)
def test_a_line_with_a_change_added_makes_the_job_the_change_is_of(model, world, line):
    shape, words = model_shape(model), ["-c", model, "-x", "bf16", "-d", "unused", *line.split()]
    options = parse_options("pretrain", words)
    before = job_of(options, shape, world, 8)
    found = list(_changes(options, before, shared=False))
    checked = 0
    for _, tried in found:
        if refusals(tried, shape, world):
            continue
        change = change_words(options, tried)
        again = parse_options("pretrain", [*words, *change.split()])
        assert refusals(again, shape, world) == [], change
        assert job_of(again, shape, world, 8) == job_of(tried, shape, world, 8), change
        assert job_of(again, shape, world, 8).tokens_per_step == before.tokens_per_step, change
        checked += 1
    assert checked >= 3


def test_steps_in_tokens_stay_steps_in_tokens():
    """--accumulation_steps beside --global_batch_tokens is refused."""
    line = "-p zero2 -b 16 -l 4096 --global_batch_tokens 1048576"
    options = parse_options("pretrain", ["-x", "bf16", "-d", "unused", *line.split()])
    shape = model_shape("7b")
    found = cheaper(job_of(options, shape, 8, 8), ROOM, options, A100)
    assert any(advice.change.startswith("-b ") for advice in found)
    for advice in found:
        assert "accumulation" not in advice.change
        assert advice.options.training.global_batch_tokens == 1048576


def test_a_larger_group_says_how_many_micro_steps_it_takes():
    options = options_of(job(rows=1))
    changes = {
        tried.parallel.tp: change_words(options, tried)
        for _, tried in _changes(options, job(rows=1), shared=False)
        if tried.parallel.tp > 1
    }
    assert changes[2] == "-p hybrid_parallel --tp 2 --accumulation_steps 2"


def test_fp32_is_not_sent_to_gemini_on_a_gpu():
    before = job(precision="fp32")
    for advice in cheaper(before, ROOM, where=A100):
        assert not advice.options.parallel.plugin.startswith("gemini")


def test_on_a_cpu_nothing_is_moved_to_the_host():
    """Processes on CPUs have one memory: what leaves the device is still in it."""
    here = cpu_host(64 * GIB, 2)
    for plugin, zero in (("zero2", 2), ("gemini", 3)):
        before = job(plugin=plugin, zero=zero, world=2)
        for shared in (False, True):
            plugins = [
                (tried.parallel.plugin, tried.parallel.offload_optim_frac)
                for _, tried in _changes(options_of(before), before, shared)
            ]
            moving = [p for p, share in plugins if share or p in ("zero2_cpu", "gemini_auto")]
            assert bool(moving) != shared
        text = out_of_memory_text(before, None, here.capacity, where=here)
        assert "in this host for its 2 process(es); planned for one process:" in text
        assert "GPU" not in text and "zero2_cpu" not in text and "offload" not in text
