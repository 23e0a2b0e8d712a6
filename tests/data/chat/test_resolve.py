"""What -d names for fine-tuning: files, the sample, and configurations of datasets of the hub."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_lib.data.chat.records import ExampleFile, resolve_conversations, takes_task_name
from llama_lib.errors import UserError
from tests.data.conftest import parquet
from tests.data.hub_server import hub
from tests.data.test_hub import SCRIPT, ask, jsonl

SELF_INSTRUCT = "yizhongw/self_instruct"

# Clients read HF_ENDPOINT when they are imported, so each test asks in a process of its own.
ASK = """
import json, sys
from pathlib import Path
from llama_lib.data.chat.records import ExampleFile, resolve_conversations
from llama_lib.errors import UserError
answers = {}
for asked in sys.argv[2:]:
    names, _, task = asked.partition("|")
    try:
        sources = resolve_conversations(names.split(","), task or None, Path(sys.argv[1]))
        answers[asked] = {
            source.name: [
                [message.content for message in example.messages]
                for path in source.files for _, example in ExampleFile(path)
            ]
            for source in sources
        }
    except UserError as error:
        answers[asked] = str(error)
print("ANSWERS", json.dumps(answers))
"""


def pairs(answer: str) -> bytes:
    buffer = io.BytesIO()
    columns = {"prompt": ["Why?"], "completion": [f"{answer}<|endoftext|>"]}
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


REPOSITORIES = {
    SELF_INSTRUCT: {
        "main": {"self_instruct.py": SCRIPT},
        "refs/convert/parquet": {
            "self_instruct/train/0000.parquet": pairs("generated"),
            "super_natural_instructions/train/0000.parquet": pairs("natural"),
            "super_natural_instructions/test/0000.parquet": pairs("held out"),
        },
    },
    "org/chats": {
        "main": {
            "data.jsonl": jsonl(
                {"messages": [{"role": r, "content": r} for r in ("user", "assistant")]}
            )
        }
    },
    "org/many": {
        "main": {"many.py": SCRIPT},
        "refs/convert/parquet": {
            "en/train/0000.parquet": pairs("english"),
            "de/train/0000.parquet": pairs("deutsch"),
        },
    },
    "org/scores": {"main": {"data.jsonl": jsonl({"question": "Why?", "score": 1})}},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    asked = [
        SELF_INSTRUCT,
        f"{SELF_INSTRUCT}|self_instruct",
        f"{SELF_INSTRUCT},org/many:de|self_instruct",
        f"{SELF_INSTRUCT}|nonsense",
        "org/many|de",
        "org/many",
        "org/chats",
        "org/scores",
    ]
    with hub(REPOSITORIES, set()) as (endpoint, _):
        answers, _ = ask(endpoint, tmp_path_factory.mktemp("home"), *asked, code=ASK)
    return answers


def test_self_instruct_comes_without_its_script_in_the_configuration_asked_for(found: dict) -> None:
    assert found[SELF_INSTRUCT] == {"self_instruct": [["Why?", "natural"]]}
    typed = found[f"{SELF_INSTRUCT}|self_instruct"]
    assert typed == {"self_instruct": [["Why?", "generated"]]}
    unknown = found[f"{SELF_INSTRUCT}|nonsense"]
    assert "the configurations: self_instruct, super_natural_instructions" in unknown


def test_a_task_name_is_for_datasets_without_a_configuration(found: dict) -> None:
    assert found[f"{SELF_INSTRUCT},org/many:de|self_instruct"] == {
        "self_instruct": [["Why?", "generated"]],
        "many": [["Why?", "deutsch"]],
    }
    assert found["org/many|de"] == {"many": [["Why?", "deutsch"]]}
    assert "choose one, as in -d org/many:de" in found["org/many"]


def test_other_datasets_of_the_hub_need_no_task_name(found: dict) -> None:
    assert found["org/chats"] == {"chats": [["user", "assistant"]]}
    assert "found question, score. Expected lines like one of these" in found["org/scores"]


def test_unreachable_hub_names_the_download_that_helps(tmp_path: Path) -> None:
    asked = [SELF_INSTRUCT, f"{SELF_INSTRUCT}|self_instruct", "org/chats"]
    found, _ = ask("http://127.0.0.1:9", tmp_path, *asked, code=ASK, HF_HUB_OFFLINE="1")
    for name, part in zip(asked, ("super_natural_instructions", "self_instruct"), strict=False):
        assert (
            f"run: hf download {SELF_INSTRUCT} --repo-type dataset --revision refs/convert/parquet "
            f"--include '{part}/train/*' --local-dir DIR, copy DIR, then -d DIR."
        ) in found[name]
    assert "run: hf download org/chats --repo-type dataset --local-dir DIR" in found["org/chats"]


def test_sample_is_conversations(tmp_path: Path) -> None:
    (source,) = resolve_conversations("sample", None, tmp_path)
    kinds = {example.kind for path in source.files for _, example in ExampleFile(path)}
    assert kinds == {"conversation"}


def test_files_of_several_shapes_and_entries(tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"prompt": "Why?", "completion": "So."}))
    (folder / "b.json").write_text(json.dumps([{"text": "a"}]))
    table = parquet(tmp_path, {"instruction": ["Why?"], "output": ["So."]})
    sources = resolve_conversations([str(folder), str(table)], None, tmp_path)
    assert [(source.name, source.entry) for source in sources] == [("a", 0), ("b", 0), ("data", 1)]
    shards = [folder / f"x-0000{number}-of-00002.jsonl" for number in range(2)]
    for shard in shards:
        shard.write_text("{}")
    names = list(map(str, shards))
    assert len(resolve_conversations(names, None, tmp_path)) == 1
    assert len(resolve_conversations(names, None, tmp_path, entries_apart=True)) == 2


def test_all_tables_without_known_columns_are_named_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pq.write_table(pa.table({"question": ["Why?"]}), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError) as caught:
        resolve_conversations(str(tmp_path), None, tmp_path)
    for name in ("a", "b"):
        assert f"{tmp_path / name}.parquet has no `messages`" in str(caught.value)


def test_prepared_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is a prepared dataset; conversations are expected here"):
        resolve_conversations(str(tmp_path), None, tmp_path)


def test_where_a_task_name_means_something(tmp_path: Path) -> None:
    assert takes_task_name([str(tmp_path), SELF_INSTRUCT])
    assert not takes_task_name(["sample", str(tmp_path), "chats.jsonl", f"{SELF_INSTRUCT}:x"])
