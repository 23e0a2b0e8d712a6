"""A stream from the hub downloads file after file, against a server on loopback."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llama_lib.data import stream_files
from llama_lib.data.entries import Entry
from llama_lib.data.hub import HubFile
from llama_lib.errors import UserError
from tests.data.hub_server import hub
from tests.data.streams import texts, write

# Clients read HF_ENDPOINT when they are imported, so each stream is read in a process of its own.
ASK = """
import json, sys, time
from pathlib import Path
from tests.data.streams import first_boundary, ids, stream
def here():
    files = [file for corpus in source.corpora for file in corpus.files]
    return [file.name for file in files if file.path is not None]
def passages(samples):
    return [list(p) for row in rows.passages(samples) for p in row]
words, state = json.loads(sys.argv[3]), json.loads(sys.argv[4])
source = stream(words, Path(sys.argv[1]), Path(sys.argv[2]), window=2)
answer = {"lines": source.describe(), "sources": source.sources, "at first": here()}
rows = source.rows(state)
sample = state.get("sample", 0)
answer["first"] = ids(rows, range(sample, sample + 5)).tolist()
time.sleep(1)
answer["after a row"] = here()
if not state:
    end = 0
    while rows.state(end)["parts"][0]["epoch"] < 1:
        end += 1
    answer["passages"] = passages(range(end))
    answer["state"] = rows.state(2 * end // 3)
    sample = answer["state"]["sample"]
    answer["there"] = ids(rows, range(sample, sample + 5)).tolist()
answer["in the end"] = here()
rows.close()
print("ANSWER", json.dumps(answer))
"""


def ask(
    endpoint: str,
    home: Path,
    tokenizer: Path,
    words: list[str],
    state: dict[str, Any],
) -> dict[str, Any]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            ASK,
            str(tokenizer),
            str(home),
            json.dumps(words),
            json.dumps(state),
        ],
        env=clean
        | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        },
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stderr
    return json.loads(lines[0].removeprefix("ANSWER "))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_files_come_one_by_one_and_a_resumed_stream_fetches_no_other(
    tmp_path: Path, tokenizer_path: Path, kind: str
) -> None:
    documents = {f"part{n}.{kind}": texts(str(n), 300) for n in range(6)}
    content = {name: write(tmp_path / name, some).read_bytes() for name, some in documents.items()}
    with hub({"org/plain": {"main": content}}, set()) as (endpoint, requests):
        home = tmp_path / "home"
        whole = ask(endpoint, home, tokenizer_path, ["org/plain"], {})
        assert whole["sources"] == ["plain"]
        assert any("6 file(s) of the hub" in line for line in whole["lines"])
        order = list(dict.fromkeys(file for _, file, *_ in whole["passages"]))
        # The one of the first rows, the one that comes next, and the first, that of the proof.
        assert whole["at first"] == [] and len(whole["in the end"]) == 6
        assert set(order[:2]) <= set(whole["after a row"])
        assert len(whole["after a row"]) <= 4 and order[1] != "part0." + kind
        expected = {
            (name, number) for name, some in documents.items() for number in range(len(some))
        }
        assert {(file, number) for _, file, number, _, _ in whole["passages"]} >= expected
        fetched = [r for r in requests if r.startswith("GET") and f".{kind}" in r]
        assert len(fetched) == len(set(fetched)) == 6
        requests.clear()
        state = whole["state"]
        other = tmp_path / "other"
        resumed = ask(endpoint, other, tokenizer_path, ["org/plain"], state)
        assert resumed["first"] == whole["there"]
        assert len(resumed["in the end"]) <= 4


def test_hub_and_files_make_one_stream(tmp_path: Path, tokenizer_path: Path) -> None:
    local = write(tmp_path / "plain.jsonl", texts("local", 50))
    content = write(tmp_path / "a.jsonl", texts("far", 50)).read_bytes()
    with hub({"org/plain": {"main": {"a.jsonl": content}}}, set()) as (endpoint, requests):
        # Two ranks of a node, which start together.
        words, home = [str(local), "org/plain"], tmp_path / "home"
        with ThreadPoolExecutor(2) as ranks:
            asked = [ranks.submit(ask, endpoint, home, tokenizer_path, words, {}) for _ in range(2)]
        found, other = (answer.result() for answer in asked)
        assert sum("GET" in request and "a.jsonl" in request for request in requests) == 1
    assert found == other
    assert found["sources"] == ["plain", "org_plain"]
    assert {source for source, *_ in found["passages"]} == {"plain", "org_plain"}


def test_processes_that_start_together_ask_the_hub_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def slow(dataset: str) -> list[HubFile]:
        asked.append(dataset)
        time.sleep(1)
        if dataset == "org/absent":
            raise UserError("there is no such thing")
        return [HubFile(("org", "plain"), "a.jsonl", "org/plain", "c0ffee", 5)]

    monkeypatch.setattr(stream_files, "hub_listing", slow)

    def listed(name: str) -> Any:
        try:
            corpora = stream_files.corpora_of(
                [Entry(name, None, None, name)], tmp_path, 1, False, 9
            )
        except UserError as error:
            return error.problems
        return [file.remote for file in corpora[0].files]

    for name, expected in (
        ("org/plain", slow("org/plain")),
        ("org/absent", ["there is no such thing"]),
    ):
        asked.clear()
        with ThreadPoolExecutor(3) as ranks:
            assert list(ranks.map(listed, [name] * 3)) == [expected] * 3
        assert asked == [name]
