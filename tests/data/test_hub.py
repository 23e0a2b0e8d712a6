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

# What is listed without a download, and then what is in the first and the last file.
LIST = """
import json, sys
from dataclasses import asdict
from llama_lib.data.hub import hub_listing
from llama_lib.data.readers import TextFile
from llama_lib.errors import UserError
answers = {}
for name in sys.argv[2:]:
    try:
        files = hub_listing(name)
        print("LISTED", file=sys.stderr)
        answers[name] = [asdict(file) for file in files]
        for at in (0, -1):
            answers[name][at]["texts"] = list(TextFile(files[at].download()))
    except UserError as error:
        answers[name] = str(error)
print("ANSWERS", json.dumps(answers))
"""


def ask(
    endpoint: str, home: Path, *names: str, code: str = ASK, **environment: str
) -> tuple[dict, str]:
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
        [sys.executable, "-c", code, str(home / "llama_lib"), *names],
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
    # Columns of different types from line to line, which the datasets library cannot convert.
    "org/clashing": {
        "main": {
            "data/train-00000-of-00002.jsonl": jsonl({"text": "one", "meta": "x"}),
            "data/train-00001-of-00002.jsonl": jsonl({"text": "two", "meta": {"a": [1]}}),
            "data/test.jsonl": jsonl({"text": "not for training", "meta": 1}),
            "README.md": b"# a dataset",
        }
    },
    "org/table": {
        "main": {"data.csv": b"text\ncomma\n"},
        "refs/convert/parquet": {"default/train/0000.parquet": parquet("comma")},
    },
    "org/only_test": {"main": {"test.jsonl": jsonl({"text": "x"})}},
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


def test_meta_of_clashing_types_is_no_obstacle(answers: dict) -> None:
    assert answers["found"]["org/clashing"] == {"clashing": ["one", "two"]}


def test_configurations_of_one_dataset_are_sources_of_their_own(tmp_path: Path) -> None:
    code = ASK.replace("resolve(name, Path(sys.argv[1]))", "resolve(name.split(','), Path('x'))")
    both = "org/many:de,org/many:en"
    with hub(REPOSITORIES, set()) as (endpoint, _):
        found, _ = ask(endpoint, tmp_path, both, code=code)
    assert found[both] == {"de": ["deutsch"], "en": ["english"]}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    home = tmp_path_factory.mktemp("listing")
    names = [*REPOSITORIES, "org/many:de", "org/absent"]
    with hub(REPOSITORIES, {"org/gated"}) as (endpoint, requests):
        found, stderr = ask(endpoint, home, *names, code=LIST)
    return {"found": found, "stderr": stderr, "requests": requests}


def test_a_listing_names_the_files_and_downloads_none(listed: dict) -> None:
    slices = listed["found"][REDPAJAMA]
    assert [file["name"] for file in slices] == ["arxiv_sample.jsonl", "cc_2019-30_sample.jsonl"]
    assert [file["parts"][-1] for file in slices] == ["arxiv_sample", "cc_2019-30_sample"]
    for file in slices:
        assert file["size"] == len(REPOSITORIES[REDPAJAMA]["main"][file["name"]])
        assert len(file["revision"]) == 40  # a commit
    assert "book_sample.jsonl is missing on the hub" in listed["stderr"]
    # Each file asked for once, after the listing; files that nobody asked for stay there.
    for name, file in (("org/plain", "data.jsonl"), ("org/script", "default/train/0000.parquet")):
        gets = [r for r in listed["requests"] if r.startswith(f"GET /datasets/{name}/resolve/")]
        assert [get.rsplit("/resolve/")[1].partition("/")[2] for get in gets if file in get] == [
            file
        ]


def test_listed_files_give_the_sources_of_a_whole_download(listed: dict, answers: dict) -> None:
    for name in (REDPAJAMA, "org/plain", "org/script", "org/clashing", "org/table", "org/many:de"):
        texts: dict[str, list[str]] = {}
        for file in listed["found"][name]:
            texts.setdefault(file["parts"][-1], []).extend(file["texts"])
        assert texts == answers["found"][name], name


def test_what_cannot_be_listed_ends_in_one_precise_message(listed: dict) -> None:
    assert "is gated" in listed["found"]["org/gated"]
    assert "org/absent" in listed["found"]["org/absent"]
    assert "there is no `train` split; found test" in listed["found"]["org/only_test"]
    assert "de, en" in listed["found"]["org/many"]
    assert "Tried its data files" in listed["found"]["org/hopeless"]


def test_unreachable_hub_cannot_list(tmp_path: Path) -> None:
    found, _ = ask("http://127.0.0.1:9", tmp_path, "org/plain", code=LIST, HF_HUB_OFFLINE="1")
    assert "its files cannot be listed" in found["org/plain"]
    assert "python -m llama_lib prepare -d org/plain" in found["org/plain"]


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
