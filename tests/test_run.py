"""Resuming: what changed is said, what is left is planned, newer checkpoints are set aside."""

import contextlib
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from llama_lib import run
from llama_lib.checkpoint.manifest import set_aside_newer, step_directories, step_directory
from llama_lib.checkpoint.store import TrainerState
from llama_lib.config import parse_options
from llama_lib.data.order import RowOrder
from llama_lib.errors import UserError
from llama_lib.layout import accumulation_of, layout_of, plan_batches
from llama_lib.resume import (
    _cannot_skip,
    _facts,
    _refuse_other_run,
    _skip_steps,
    _what_keeps,
    continued_plan,
    option_differences,
)


def state(step: int, samples: int, tokens: int, **facts) -> TrainerState:
    return TrainerState(step, tokens, samples, 0, 42, {}, **facts)


def planned(argv: list[str], tokens: int = 10_000, length: int = 10):
    options = parse_options("pretrain", argv)
    order = RowOrder(np.array([tokens]), length, 0)
    rows = order.num_rows(options.training.num_epochs)
    plan = plan_batches(options, layout_of(options, 1), length, rows)
    data = SimpleNamespace(num_rows=order.num_rows)
    return SimpleNamespace(options=options, data=data, plan=plan)


def test_same_batch_keeps_the_plan():
    run = planned(["-b", "4", "--max_steps", "100"])
    assert continued_plan(run, state(40, 160, 1600)) == run.plan


def test_other_batch_goes_on_with_the_next_unseen_sample():
    run = planned(["-b", "8"])  # 1000 rows
    plan = continued_plan(run, state(100, 400, 4000))
    assert plan.num_steps == 100 + (1000 - 400) // 8
    assert plan.dropped_rows == (1000 - 400) % 8


@pytest.mark.parametrize(
    ("rows", "processes", "options", "words"),
    [
        (8, 1, ["-b", "4"], "--global_batch_tokens 80 keeps it"),
        (8, 3, ["-b", "4"], "no --global_batch_tokens keeps it: 8 rows have no equal parts for"),
        (8, 4, ["-b", "4"], "-b 2 --global_batch_tokens 80 keeps it"),
        (12, 2, ["-b", "4"], "-b 3 --global_batch_tokens 120 keeps it"),
    ],
)
def test_what_keeps_the_global_batch_is_said_only_where_it_does(rows, processes, options, words):
    """`keeps it on any number of them` was refused on three processes."""
    run = planned([*options, "--max_steps", "100"])
    run.plan = dataclasses.replace(run.plan, dp=processes)
    said = _what_keeps(rows, run.options, run.plan)
    assert said.startswith(words)
    for size in (1, 2, 3, 4):
        chosen = parse_options("pretrain", ["-b", str(size), "--global_batch_tokens", f"{rows}0"])
        fits = isinstance(accumulation_of(chosen, processes, run.plan.max_length), int)
        assert fits or f"-b {size} " not in said
    if said.startswith("no "):
        assert not fits


def test_limits_count_the_whole_run():
    run = planned(["-b", "8", "--max_tokens", "6000"])
    # 4000 tokens seen, 2000 left = 25 steps of 8 x 10 tokens.
    assert continued_plan(run, state(100, 400, 4000)).num_steps == 125
    run = planned(["-b", "8", "--max_steps", "110"])
    assert continued_plan(run, state(100, 400, 4000)).num_steps == 110


def test_skipped_steps_shorten_the_run_by_their_rows():
    run = planned(["-b", "4", "--skip_steps", "11:16"])  # 250 steps
    fresh, said = state(0, 0, 0), []
    _skip_steps(run, fresh, said.append)
    assert run.plan.num_steps == 245
    assert fresh.position.samples(9, 4) == [36, 37, 38, 39]  # step 10, counted from 1
    assert fresh.position.samples(10, 4) == [60, 61, 62, 63]  # step 11 takes what 16 would have
    assert said == ["--skip_steps 11:16: rows 40 to 59 of the data order are left out"]


def test_skipped_steps_hold_when_the_same_command_is_resumed():
    run = planned(["-b", "4", "--skip_steps", "11:16"])
    first, said = state(0, 0, 0), []
    _skip_steps(run, first, said.append)
    later = state(
        30, 120, 1200, next_sample=140, skips=first.skips, skipped_steps=first.skipped_steps
    )
    _skip_steps(run, later, said.append)
    assert said[1:] == ["--skip_steps 11:16: left out already, and stays so"]
    assert continued_plan(run, later).num_steps == 245


def test_steps_that_are_done_cannot_be_skipped():
    run = planned(["-b", "4", "--skip_steps", "11:16"])
    with pytest.raises(UserError, match=r"step 11 is done there.*after step 11;.*--load PATH"):
        _skip_steps(run, state(11, 44, 440), print)


def test_more_steps_than_the_run_has_cannot_be_skipped():
    run = planned(["-b", "4", "--skip_steps", "11:252"])
    with pytest.raises(UserError, match="the run has only 250 steps"):
        _skip_steps(run, state(0, 0, 0), print)


def test_what_was_left_out_before_stays_in_the_options():
    """Going back to a checkpoint before two gaps, with the file of the run alone."""
    run = planned(["-b", "4", "--skip_steps", "11:16"])
    before = state(0, 0, 0)
    _skip_steps(run, before, print)
    run = planned(["-b", "4", "--skip_steps", "30:32"])
    later = state(20, 80, 800, skips=before.skips, skipped_steps=before.skipped_steps)
    later.next_sample = 100
    _skip_steps(run, later, print)
    assert run.options.data.skip_steps == ["11:16", "30:32"]
    again = planned(["-b", "4", "--skip_steps", "11:16", "30:32"])
    fresh = state(0, 0, 0)
    _skip_steps(again, fresh, print)
    assert fresh.skips == later.skips
    assert again.plan.num_steps == 250 - 5 - 2


def test_auto_goes_back_before_the_steps_to_skip():
    options = parse_options("pretrain", ["--skip_steps", "11:16"])
    assert _cannot_skip(options, state(10, 40, 400)) is None
    assert _cannot_skip(options, state(11, 44, 440)) == (
        "--skip_steps 11:16: step 11 is done there already"
    )
    assert _cannot_skip(options, state(11, 44, 440, skipped_steps=["11:16"])) is None


def test_the_length_of_a_stream_is_that_of_the_limits():
    run = planned(["-b", "4", "--max_tokens", "4000", "--streaming"])
    run.data.num_rows = None
    assert continued_plan(run, state(10, 40, 400)).num_steps == 100


def test_differences_are_one_line_each():
    before = parse_options("pretrain", ["--lr", "1e-3", "-p", "zero2"]).to_dict()
    now = parse_options("pretrain", ["--lr", "2e-3", "--load", "auto"]).to_dict()
    assert option_differences(before, now) == [
        "--plugin was zero2, now gemini",
        "--lr was 0.001, now 0.002",
    ]


def test_another_model_or_data_is_refused_with_all_reasons(tmp_path):
    saved = state(
        5,
        5,
        5,
        model={"hidden_size": 64, "vocab_size": 10},
        data={"tokenizer": "a", "manifest": "m", "max_length": 32, "seed": 1},  # an older version's
    )
    with pytest.raises(UserError) as caught:
        _refuse_other_run(
            tmp_path,
            saved,
            {"hidden_size": 128, "vocab_size": 10},
            {
                "tokenizer": "b",
                "manifest": "m",
                "max_length": 64,
                "seed": 1,
                "packing": "best_fit",
                "streaming": False,
            },
        )
    message = str(caught.value)
    assert "hidden_size 64, this run has 128" in message
    assert "another tokenizer" in message and "another max_length" in message
    assert "another packing (concat, this run has best_fit)" in message
    assert "seed" not in message and "streaming" not in message


def chat_run(*flags: str):
    """A fine-tuning run, as far as it decides whether a checkpoint fits it."""
    return SimpleNamespace(
        options=parse_options("finetune", ["-p", "zero2", *flags]),
        config=SimpleNamespace(hidden_size=64),
        data=SimpleNamespace(tokenizer_hash="t", identity="d"),
        chat=SimpleNamespace(),
        tokenizer=SimpleNamespace(chat_template="{{ messages }}"),
    )


@pytest.mark.parametrize(
    ("flag", "before", "now"),
    [
        ("--lora_rank", ["8"], ["16"]),
        ("--lora_alpha", ["16"], ["32"]),
        ("--lora_targets", ["q_proj"], ["q_proj", "v_proj"]),
        ("--no_packing", None, []),
        ("--no_packing", [], None),
        ("--min_length", None, ["5"]),
        ("--overlong", ["cut"], ["drop"]),
        ("--loss_role", ["assistant"], ["all"]),
        ("--other_role_weight", ["0"], ["0.5"]),
    ],
)
def test_what_decides_adapters_and_labels_must_stay(tmp_path, flag, before, now):
    adapters = [] if flag == "--lora_rank" else ["--lora_rank", "8"]
    one, other = (
        _facts(chat_run(*adapters, *([] if values is None else [flag, *values])))
        for values in (before, now)
    )
    saved = state(5, 5, 5, model=one[0], data=one[1])
    _refuse_other_run(tmp_path, saved, *one)
    with pytest.raises(UserError) as caught:
        _refuse_other_run(tmp_path, saved, *other)
    (problem,) = caught.value.problems
    assert flag in problem


def test_newer_checkpoints_are_renamed_never_deleted(tmp_path):
    for step in (5, 10, 15):
        step_directory(tmp_path, step).mkdir()
        (step_directory(tmp_path, step) / "complete.json").write_text(str(step))
    lines = set_aside_newer(tmp_path, 5)
    assert [d.name for d in step_directories(tmp_path)] == ["step-00000005"]
    assert (tmp_path / "step-00000010.aside-1" / "complete.json").read_text() == "10"
    assert len(lines) == 2 and "step-00000015" in lines[0]
    step_directory(tmp_path, 10).mkdir()
    set_aside_newer(tmp_path, 5)
    assert (tmp_path / "step-00000010.aside-2").is_dir()


def test_the_deadline_of_the_start_begins_when_all_have_imported(monkeypatch):
    """It began when the fastest process had: a host with a cold disk ended the run."""
    done = []

    @contextlib.contextmanager
    def starting(save_dir, seconds):
        done.append("deadline")
        yield

    def start_process_group(seed, joining):
        done.append("imported")
        with joining:
            done.append("joined")
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "start_process_group", start_process_group)
    watchdog = SimpleNamespace(ready=lambda: done.append("ready"), starting=starting)
    with pytest.raises(KeyboardInterrupt):
        run.train(planned(["-b", "4"]), watchdog)
    assert done == ["imported", "ready", "deadline", "joined"]
