"""Hub names, against a server on loopback that speaks the hub's protocol."""

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.hub_server import hub

REDPAJAMA = "togethercomputer/RedPajama-Data-1T-Sample"
SCRIPT = b"import datasets\nraise SystemExit('a loading script was run')\n"

# Clients read HF_ENDPOINT when they are imported, so each test asks in a process of its own.
ASK = """
import json, sys
from pathlib import Path
from llama_lib.data.sources import records, resolve
from llama_lib.errors import UserError
answers = {}
for name in sys.argv[2:]:
    try:
        answers[name] = {s.name: list(records(s)) for s in resolve(name, Path(sys.argv[1]))}
    except UserError as error:
        answers[name] = str(error)
print("ANSWERS", json.dumps(answers))
"""


def ask(endpoint: str, home: Path, *names: str, **environment: str) -> tuple[dict, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    clean |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(home / "llama_lib"), *names],
        env=clean,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, done.stderr
    return json.loads(lines[0].removeprefix("ANSWERS ")), done.stderr


def jsonl(*records: dict) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def parquet(*texts: str) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts), "id": list(range(len(texts)))}), buffer)
    return buffer.getvalue()


REPOSITORIES = {
    REDPAJAMA: {
        "main": {
            "RedPajama-Data-1T-Sample.py": SCRIPT,
            # meta is a string in one slice and an object in another, as in the real one
            "arxiv_sample.jsonl": jsonl({"text": "arxiv one", "meta": {"id": 1}}),
            "cc_2019-30_sample.jsonl": jsonl({"text": "crawl", "source": "cc", "meta": "x"}),
        }
    },
    "org/plain": {"main": {"data.jsonl": jsonl({"text": "plain one"}, {"text": "plain two"})}},
    "org/script": {
        "main": {"script.py": SCRIPT},
        "refs/convert/parquet": {"default/train/0000.parquet": parquet("from parquet")},
    },
    "org/hopeless": {"main": {"hopeless.py": SCRIPT}},
    "org/many": {
        "main": {"many.py": SCRIPT},
        "refs/convert/parquet": {
            "en/train/0000.parquet": parquet("english"),
            "de/train/0000.parquet": parquet("deutsch"),
        },
    },
    "org/gated": {"main": {"data.jsonl": jsonl({"text": "secret"})}},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict:
    home = tmp_path_factory.mktemp("home")
    names = [*REPOSITORIES, "org/many:de", "org/absent", "no/such/file.jsonl"]
    with hub(REPOSITORIES, {"org/gated"}) as (endpoint, requests):
        found, stderr = ask(endpoint, home, *names)
        # The second time without a hub: what was downloaded is enough.
        offline, _ = ask(endpoint, home, REDPAJAMA, "org/plain", HF_HUB_OFFLINE="1")
        return {"found": found, "stderr": stderr, "requests": requests, "offline": offline}


def test_redpajama_sample_is_read_file_by_file_and_missing_slices_are_named(answers: dict) -> None:
    assert answers["found"][REDPAJAMA] == {
        "arxiv_sample": ["arxiv one"],
        "cc_2019-30_sample": ["crawl"],
    }
    assert "book_sample.jsonl is missing on the hub" in answers["stderr"]
    scripts = [request for request in answers["requests"] if request.endswith(".py")]
    assert not any(REDPAJAMA in request for request in scripts)


def test_data_repository_loads_by_name(answers: dict) -> None:
    assert answers["found"]["org/plain"] == {"plain": ["plain one", "plain two"]}


def test_script_repository_comes_from_its_parquet_branch(answers: dict) -> None:
    assert answers["found"]["org/script"] == {"script": ["from parquet"]}
    assert answers["found"]["org/many:de"] == {"many": ["deutsch"]}


def test_what_cannot_be_had_ends_in_one_precise_message(answers: dict) -> None:
    hopeless = answers["found"]["org/hopeless"]
    assert "load_dataset" in hopeless and "refs/convert/parquet" in hopeless
    assert "-d path/to/*.jsonl" in hopeless
    many = answers["found"]["org/many"]
    assert "de, en" in many and "org/many:de" in many
    assert "gated" in answers["found"]["org/gated"] and "HF_TOKEN" in answers["found"]["org/gated"]
    assert "org/absent" in answers["found"]["org/absent"]
    assert "no such file" in answers["found"]["no/such/file.jsonl"]


def test_downloaded_data_is_found_again_offline(answers: dict) -> None:
    for name in (REDPAJAMA, "org/plain"):
        assert answers["offline"][name] == answers["found"][name]


def test_unreachable_hub_names_the_way_out(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        found, _ = ask(endpoint, tmp_path, REDPAJAMA)
        # The client of the second would ask for half a minute before it gives up.
        offline, _ = ask(endpoint, tmp_path, "org/plain", HF_HUB_OFFLINE="1")
    found |= offline
    for name in (REDPAJAMA, "org/plain"):
        assert "cannot be reached" in found[name]
        assert f"python -m llama_lib prepare -d {name} --output DIR" in found[name]
