"""What the plan recommends: legal, the largest that fits, and ranked."""

from dataclasses import replace
from itertools import pairwise

import pytest

from llama_lib.config import PLUGINS, Options, parse_options
from llama_lib.layout import layout_of, layout_problems, plan_batches
from llama_lib.models import model_shape
from llama_lib.planner.hardware import GIB, Machines, known_gpu, machines
from llama_lib.planner.job import job_of
from llama_lib.planner.memory import memory
from llama_lib.planner.search import (
    NEARLY,
    STEP_TOKENS,
    Question,
    changed,
    excess,
    fits,
    flags,
    largest,
    largest_batch,
    limits,
    refusals,
    search,
)

A100 = machines(known_gpu("a100-80gb"), 8)
CASES = [
    ("70b", 32, 4096),
    ("7b", 8, 4096),
    ("mistral-7b", 4, 8192),
    ("llama3-8b", 2, 8192),
    ("1.1b", 1, 2048),
    ("30b", 24, 2048),
]


def question(model="7b", world=8, length=4096, where: Machines = A100, **changes) -> Question:
    shape = model_shape(model)
    options = changed(Options(), max_length=length, mixed_precision="bf16")
    together = replace(where, gpus_per_host=min(world, where.gpus_per_host))
    values = {
        "options": options,
        "shape": shape,
        "world_size": world,
        "machines": together,
        "limit": limits(together, None),
    }
    return Question(**values | changes)


@pytest.mark.parametrize(("model", "world", "length"), CASES)
def test_no_plan_is_refused_by_the_program_it_is_for(model, world, length):
    asked = question(model, world, length)
    plans = search(asked)
    assert plans
    for plan in plans:
        words = flags(plan.options, world)
        options = parse_options("pretrain", ["-c", model, "-d", "unused", *words])
        assert layout_problems(options, world, asked.shape) == [], words
        plan_batches(options, layout_of(options, world), length, 2**62)
        # The command line makes the very job the numbers are of.
        assert job_of(options, asked.shape, world, 8) == plan.job, words
        assert plan.fits == (plan.need.device_total - plan.need.evictable <= asked.limit.device)


def test_every_plugin_is_tried_and_the_fastest_that_fits_comes_first():
    plans = search(question())
    assert {plan.job.layout.plugin for plan in plans} == set(PLUGINS)
    assert {plan.job.recompute for plan in plans} == {"none", "selective", "full"}
    fitting = [plan.tokens_per_second for plan in plans if plan.fits]
    assert 0 < len(fitting) < len(plans)
    assert all(plan.fits for plan in plans[: len(fitting)])
    # In their order to three digits, within which the smaller comes first.
    assert all(a > 0.99 * b for a, b in pairwise(fitting))
    lacking = [excess(plan, question().limit) for plan in plans[len(fitting) :]]
    assert lacking == sorted(lacking) and lacking[0] > 0


@pytest.mark.parametrize("plugin", ["zero2", "gemini", "gemini_auto"])
def test_the_batch_is_the_largest_that_fits(plugin):
    asked = question(plugin=plugin)
    for plan in search(asked):
        if not plan.fits:
            continue
        rows = largest_batch(plan.options, asked)
        for number in (rows, rows + 1):
            options = changed(plan.options, batch_size=number, accumulation_steps=1)
            job = job_of(options, asked.shape, 8, 8)
            assert fits(job, memory(job), asked.limit) == (number == rows)
        # Fewer only where the largest does not make up a step.
        assert plan.job.batch_size == rows or rows * (128 // rows) < 0.95 * 128


def test_a_step_has_no_more_tokens_than_asked_for_and_nearly_as_many():
    for plan in search(question()):
        tokens = plan.job.tokens_per_step
        assert STEP_TOKENS * NEARLY <= tokens <= STEP_TOKENS, plan.job
    small = search(question(step_tokens=8 * 4096))
    assert all(plan.job.tokens_per_step <= 8 * 4096 or plan.job.layout.pp > 1 for plan in small)


def test_what_is_fixed_stays():
    asked = question(plugin="hybrid_parallel", tp=2, pp=2, batch_size=8, recompute="full")
    plans = search(asked)
    assert plans
    for plan in plans:
        assert (plan.job.layout.tp, plan.job.layout.pp, plan.job.batch_size) == (2, 2, 8)
        assert plan.job.recompute == "full"


def test_the_reserve_is_kept_free_and_a_host_that_is_too_small_refuses_offloading():
    tight = limits(A100, None)
    assert tight.device == int(80 * GIB * 0.96) - GIB
    offloading = question(plugin="zero2_cpu")
    assert any(plan.fits for plan in search(offloading))
    small_host = replace(offloading, limit=limits(A100, 32 * GIB))
    assert not any(plan.fits for plan in search(small_host))


def test_gemini_auto_moves_weights_and_pays_for_it():
    roomy, tight = (
        question(
            "13b",
            2,
            plugin="gemini_auto",
            recompute="full",
            batch_size=1,
            where=replace(A100, capacity=gib * GIB),
        )
        for gib in (80, 16)
    )
    (with_room,), (without,) = search(roomy), search(tight)
    assert with_room.fits and without.fits
    assert memory(without.job).device_total > tight.limit.device
    assert without.time.parts["offload"] > with_room.time.parts["offload"]
    none_left = replace(tight, limit=limits(replace(A100, capacity=4 * GIB), None))
    assert not search(none_left)[0].fits


def test_processes_on_a_cpu_share_what_the_host_has():
    options = changed(Options(), plugin="zero2", max_length=512, mixed_precision="bf16")
    shape = model_shape("tiny")
    job = job_of(options, shape, 2, 2)
    need = memory(job)
    together = 2 * need.device_total + need.host_total
    shared = replace(A100, shared_memory=True)
    assert fits(job, need, limits(replace(shared, capacity=together), None))
    assert not fits(job, need, limits(replace(shared, capacity=together - 1), None))


def test_refusals_name_what_the_start_would():
    options = changed(Options(), plugin="hybrid_parallel", tp=3, max_length=4096)
    shape = model_shape("7b")
    assert any("--tp 3" in problem for problem in refusals(options, shape, 3))
    long = changed(Options(), max_length=8192)
    assert any("context of 4096" in problem for problem in refusals(long, shape, 1))
    few = changed(Options(), plugin="hybrid_parallel", pp=4, batch_size=2, max_length=4096)
    assert any("at least 4 micro-batches" in problem for problem in refusals(few, shape, 4))


def test_the_largest_accepted_number_is_found():
    for threshold in (0, 1, 7, 8, 100):
        assert largest(lambda number: number <= threshold, 64) == min(threshold, 64)  # noqa: B023
