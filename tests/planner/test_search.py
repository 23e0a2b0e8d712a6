"""What the plan recommends: legal, the largest that fits, and ranked."""

from dataclasses import replace
from itertools import pairwise

import pytest

from llama_lib.config import Options, parse_options
from llama_lib.layout import layout_of, layout_problems, plan_batches
from llama_lib.models import model_shape
from llama_lib.option_checks import model_problems, setting_problems
from llama_lib.option_tree import PLUGINS
from llama_lib.planner.command_line import flags
from llama_lib.planner.hardware import GIB, Machines, cpu_host, known_gpu, machines
from llama_lib.planner.job import job_of
from llama_lib.planner.memory import memory
from llama_lib.planner.search import (
    COMFORTABLE,
    EQUAL_RATES,
    NEARLY,
    Question,
    changed,
    excess,
    fits,
    largest,
    largest_batch,
    limits,
    ranked,
    refusals,
    search,
    step_tokens_of,
)

STEP_TOKENS = 2**22
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
        "step_tokens": STEP_TOKENS,
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
    # In their order but for rates that count as equal.
    assert all(a >= (1 - EQUAL_RATES) * b for a, b in pairwise(fitting))
    lacking = [excess(plan, question().limit) for plan in plans[len(fitting) :]]
    assert lacking == sorted(lacking) and lacking[0] > 0


@pytest.mark.parametrize("plugin", ["zero2", "gemini", "gemini_auto"])
def test_the_batch_is_the_largest_that_fits_or_the_largest_that_leaves_room(plugin):
    asked = question(plugin=plugin)
    fitting = [plan for plan in search(asked) if plan.fits]
    assert fitting
    for plan in fitting:
        rows = largest_batch(plan.job, asked.limit)
        for number in (rows, rows + 1):
            job = replace(plan.job, batch_size=number, microbatch_size=number)
            assert fits(job, memory(job), asked.limit) == (number == rows)
        room = asked.limit
        if not plan.tight:
            room = replace(room, device=int(COMFORTABLE * room.device))
        most = largest_batch(plan.job, room)
        # Fewer only where the largest does not make up a step.
        assert plan.job.batch_size == most or most * (128 // most) < NEARLY * 128


@pytest.mark.parametrize(
    ("model", "world", "length", "card"),
    [
        ("7b", 1, 4096, "a100-80gb"),
        ("13b", 2, 4096, "a100-80gb"),
        ("7b", 4, 2048, "a100-40gb"),
        ("30b", 8, 2048, "a100-80gb"),
    ],
)
def test_what_does_not_fit_does_not_with_a_single_row_either(model, world, length, card):
    """Gradients of earlier micro-steps take room: a batch is tried with its own accumulation."""
    asked = question(model, world, length, machines(known_gpu(card), 8))
    refused = [plan for plan in search(asked) if not plan.fits and plan.job.layout.pp == 1]
    assert refused
    for plan in refused:
        in_step = asked.step_tokens // (length * plan.job.layout.dp)
        one = replace(plan.job, batch_size=1, microbatch_size=1, accumulation=in_step)
        assert not fits(one, memory(one), asked.limit), plan.job


def test_a_batch_that_fits_with_accumulation_is_found():
    h200 = machines(known_gpu("h200"), 1)
    asked = question("7b", 1, where=h200, plugin="zero2", recompute="full", step_tokens=2**20)
    best = search(asked)[0]
    assert best.fits and best.job.accumulation > 1
    # The largest batch of one micro-step would not leave room for the gradients of earlier ones.
    alone = largest_batch(replace(best.job, accumulation=1), asked.limit)
    assert alone > largest_batch(best.job, asked.limit) >= best.job.batch_size
    small = search(question("1.1b", 1, 2048, h200, step_tokens=2**19))[0]
    assert small.fits and small.job.recompute == "none"


def test_a_batch_that_fits_is_no_larger_than_the_largest():
    """More GPUs than rows in a step: the largest batch is not bounded by the step."""
    h200 = machines(known_gpu("h200"), 8)
    asked = question("7b", 512, where=h200, plugin="zero2", batch_size=4)
    for plan in search(asked):
        assert plan.fits == (largest_batch(plan.job, asked.limit) >= 4)


def test_equal_rates_are_ordered_by_what_can_go_wrong():
    asked = question()
    plan = search(asked)[0]
    fast, slow = (replace(plan.time, tokens=tokens) for tokens in (1_000_000, 960_000))
    gemini = replace(plan.job, layout=replace(plan.job.layout, plugin="gemini", zero_stage=3))
    host = replace(plan.job, layout=replace(plan.job.layout, plugin="zero2_cpu"))
    best = replace(plan, time=slow, tight=False)
    other = replace(best, job=gemini, time=fast)
    tight = replace(plan, time=fast, tight=True)
    moved = replace(plan, time=fast, tight=False, job=host)
    slower = replace(best, time=replace(plan.time, tokens=940_000))
    order = [best, other, tight, moved, slower]
    assert best.job.layout.plugin == "zero2"
    assert ranked(reversed(order), asked.limit) == order


def test_a_plan_that_takes_nearly_all_is_tight():
    asked = question()
    plans = [plan for plan in search(asked) if plan.fits]
    assert {plan.tight for plan in plans} == {True, False}
    for plan in plans:
        need = plan.need.device_total - plan.need.evictable
        assert plan.tight == (need > int(COMFORTABLE * asked.limit.device))


@pytest.mark.parametrize(("model", "tokens"), [("1.1b", 19), ("7b", 20), ("13b", 20), ("70b", 22)])
def test_larger_models_take_longer_steps(model, tokens):
    assert step_tokens_of(model_shape(model)) == 2**tokens


def test_fp32_is_planned_with_what_has_it():
    """ColossalAI's gemini has no fp32 on a GPU: the start refuses it, and so does the plan."""
    asked = question("1.1b", 2, 2048)
    options = changed(asked.options, mixed_precision="fp32")
    on_gpus = search(replace(asked, options=options))
    assert {plan.job.layout.plugin for plan in on_gpus} == {
        "zero2",
        "zero2_cpu",
        "hybrid_parallel",
    }
    for plan in on_gpus:
        layout = layout_of(plan.options, 2)
        assert setting_problems(plan.options, has_gpu=True) == []
        assert model_problems(plan.options, asked.shape, 2) == [], layout
        assert plan.time is None
    cpu = cpu_host(256 * GIB, 2)
    on_cpus = replace(asked, options=options, machines=cpu, limit=limits(cpu, None))
    assert "gemini" in {plan.job.layout.plugin for plan in search(on_cpus)}


def test_what_one_plugin_has_does_not_keep_others_out():
    asked = question()
    options = changed(
        asked.options,
        plugin="hybrid_parallel",
        tp=2,
        pp=2,
        zero_stage=1,
        microbatch_size=2,
        batch_size=4,
    )
    free = search(replace(asked, options=options))
    assert [plan.job for plan in free] == [plan.job for plan in search(asked)]


def test_no_plan_is_zero2_by_another_name():
    for plan in [*search(question("1.1b", 1, 2048)), *search(question())]:
        layout = plan.job.layout
        if layout.plugin == "hybrid_parallel":
            assert layout.tp * layout.pp > 1 or (layout.dp > 1 and layout.zero_stage < 2)
    asked = question("1.1b", 1, 2048, plugin="hybrid_parallel")
    assert search(asked)


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
