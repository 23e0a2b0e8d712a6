"""Reports of the jobs that the selected tests need, and a tiny dataset and model for real runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.sample import sample_records
from llama_lib.data.tokenizer import save_tokenizer, train_tokenizer
from tests.distributed.cases import MODEL, num_processes
from tests.distributed.launching import run

SECONDS_PER_JOB = 60

Job = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The report of a job "check/layout/precision" that a selected test names in `needs`.

    All jobs of one number of processes run in one start, the first time one of them is asked for.
    """
    jobs: dict[int, list[str]] = {}
    for item in request.session.items:
        for mark in item.iter_markers("needs"):
            for job in mark.args:
                group = jobs.setdefault(num_processes(job.split("/")[1]), [])
                if job not in group:
                    group.append(job)
    entries: dict[str, dict[str, Any]] = {}
    outputs: dict[int, str] = {}

    def start(processes: int) -> str:
        folder = tmp_path_factory.mktemp(f"jobs-{processes}")
        try:
            output = run(
                "tests/distributed/worker.py",
                [str(folder), *jobs[processes]],
                folder / "output.txt",
                processes,
                timeout=60 + SECONDS_PER_JOB * len(jobs[processes]),
            ).output
        except AssertionError as too_slow:
            output = str(too_slow)
        path = folder / "report.jsonl"
        for line in path.read_text().splitlines() if path.is_file() else []:
            entry = json.loads(line)
            entries[entry["job"]] = entry
        return output

    def report_of(job: str) -> dict[str, Any]:
        processes = num_processes(job.split("/")[1])
        if processes not in outputs:
            outputs[processes] = start(processes)
        assert job in entries, f"{job} never ended:\n{outputs[processes]}"
        assert "error" not in entries[job], entries[job]["error"]
        return entries[job]["report"]

    return report_of


@pytest.fixture(scope="session")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json for -c: small enough that a checkpoint takes a moment."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **MODEL}))
    return path


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of documentation text whose tokenizer fits the model."""
    folder = tmp_path_factory.mktemp("dataset")
    texts = [str(record["text"]) for record in sample_records("documentation")]
    save_tokenizer(train_tokenizer(texts, MODEL["vocab_size"]), folder / "tokenizer")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines)
    return prepare(
        PrepareRequest(
            datasets=[str(folder / "text.jsonl")],
            tokenizer=str(folder / "tokenizer"),
            output=folder / "prepared",
            cache_dir=folder / "cache",
            workers=1,
        )
    ).path


@pytest.fixture(scope="session")
def flags(dataset: Path, model_config: Path) -> list[str]:
    """What every real run of these tests is given: the data, the model, a record of every step."""
    common = "-l 32 --lr 1e-3 -s 2 --log_interval 1"
    return ["-d", str(dataset), "-c", str(model_config), *common.split()]
