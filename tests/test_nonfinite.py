"""Skipped steps are counted, and the documents that were in them named."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama_lib.config import Options, parse_options
from llama_lib.data.entries import parse_entries
from llama_lib.data.loader import BatchLoader
from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.random_rows import random_data
from llama_lib.data.stream import open_stream
from llama_lib.data.training_data import prepared_data
from llama_lib.engine import GradientNorm
from llama_lib.errors import JobError, RunError
from llama_lib.nonfinite import MAX_NONFINITE_STEPS, NonfiniteSteps

FINE = GradientNorm(1.0, None)
NAN = GradientNorm(float("nan"), None)
OVERFLOW = GradientNorm(None, torch.tensor(1024.0))
LENGTH, ROWS = 16, 4


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    lines = [{"text": f"document {number} " + "word " * 30} for number in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def options(tmp_path) -> Options:
    return parse_options("pretrain", ["-o", str(tmp_path / "run")])


@pytest.fixture(scope="module")
def prepared(text, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    request = PrepareRequest([str(text)], tokenizer="sample", cache_dir=cache, eval_ratio=0.0)
    return prepared_data(prepare(request), LENGTH, 1, "concat", False, 0, cache)


def source_of(data, state=None):
    return data.open_rows(state or {})


def test_the_line_names_the_documents_of_the_step(options, prepared):
    rows = source_of(prepared)
    samples = [0, 1, 2, 3]
    expected = {(p.file, p.number) for row in prepared.passages(samples, {}) for p in row}
    assert len(expected) > 3, "the case is to have more documents than a message names"
    steps = NonfiniteSteps(options, prepared.passages)
    line = steps.check(5, NAN, samples, rows)
    assert line.startswith("step 5: gradient norm is nan, step skipped; its rows are of document ")
    named = line.partition("its rows are of ")[2].partition(" and ")[0].split(", ")
    assert len(named) == 3
    for name in named:
        assert any(f"document {n} of words ({f})" == name for f, n in expected)
    save_dir = options.checkpoint.save_dir
    more = len(expected) - 3
    assert line.endswith(f"and {more} more (all: python -m llama_lib inspect {save_dir} --step 5)")


def test_a_finite_step_asks_nothing(options):
    def passages(samples, state):
        raise AssertionError

    steps = NonfiniteSteps(options, passages)
    assert steps.check(1, FINE, [0], None) is None


def test_the_end_names_the_documents_of_the_last_step(options, prepared):
    steps = NonfiniteSteps(options, prepared.passages)
    rows = source_of(prepared)
    for step in range(1, MAX_NONFINITE_STEPS):
        assert steps.check(step, OVERFLOW, [step], rows)
    with pytest.raises(RunError) as raised:
        steps.check(10, NAN, [9], rows)
    message = str(raised.value)
    (row,) = prepared.passages([9], {})
    assert f"its rows are of document {row[0].number} of words ({row[0].file})" in message
    assert f"inspect {options.checkpoint.save_dir} --step 10" in message
    assert "there is no checkpoint yet. Try -x bf16, a lower --lr" in message
    assert isinstance(raised.value, JobError), "every process ends so: one is to speak"


def test_a_finite_step_ends_the_row(options, prepared):
    steps = NonfiniteSteps(options)
    rows = source_of(prepared)
    for step in range(1, 3 * MAX_NONFINITE_STEPS):
        norm = FINE if step % MAX_NONFINITE_STEPS == 0 else NAN
        steps.check(step, norm, [0], rows)


def open_text(text: Path, cache: Path):
    return open_stream(parse_entries([str(text)]), "sample", LENGTH, 1, cache, chunk_bytes=512)


def test_naming_moves_no_data_of_a_stream(options, text, tmp_path):
    """Rows, and the state a checkpoint keeps, are those of a run in which nobody asked."""
    undisturbed, asked = (open_text(text, tmp_path / "cache") for _ in range(2))
    expected = BatchLoader(undisturbed.rows(), ROWS)
    loader = BatchLoader(asked.rows(), ROWS)
    options.data.streaming = True
    steps = NonfiniteSteps(options, asked.passages)
    lines = []
    try:
        theirs = expected.steps(0, 6)
        for step, rows in enumerate(loader.steps(0, 6)):
            lines.append(steps.check(step + 1, NAN, rows.samples, loader.source))
            same = next(theirs)
            assert (rows.micro_batches[0].ids == same.micro_batches[0].ids).all()
            first = rows.samples[0]
            assert loader.source.state(first) == expected.source.state(first)
        assert loader.source.num_chunks == expected.source.num_chunks
    finally:
        loader.close()
        expected.close()
    place = asked.rows()
    truth = place.passages(list(range(ROWS)))
    place.close()
    first = truth[0][0]
    assert f"its rows are of record {first.number} of {first.file} (words)" in lines[0]


def test_rows_without_documents_are_not_named(options):
    data = random_data(100, LENGTH, 1, False)
    line = NonfiniteSteps(options, data.passages).check(2, NAN, [0, 1], source_of(data))
    assert line == "step 2: gradient norm is nan, step skipped"


def test_a_benchmark_has_no_ledger_to_inspect(prepared):
    options = parse_options("benchmark", [])
    line = NonfiniteSteps(options, prepared.passages).check(2, NAN, [0], source_of(prepared))
    assert "its rows are of document" in line
    assert "inspect" not in line


def test_data_that_changed_meanwhile_do_not_end_the_run(options):
    def passages(samples, state):
        raise RunError("words.jsonl was written to")

    source = SimpleNamespace(state=lambda sample: {})
    line = NonfiniteSteps(options, passages).check(2, NAN, [0], source)
    assert line.endswith("its documents cannot be named (words.jsonl was written to)")


def test_conversations_are_named_by_their_records(prepared, tmp_path):
    options = parse_options("finetune", ["--model_path", "m"])
    (row,) = prepared.passages([0], {})
    name = f"record {row[0].number} of {row[0].file}"
    line = NonfiniteSteps(options, prepared.passages).check(1, NAN, [0], source_of(prepared))
    assert f"its rows are of {name}" in line
