"""Conversations are encoded once, by one process, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llama_lib.data.chat import store as store_module
from llama_lib.data.chat.roles import ASSISTANT, ROLE_NAMES, TEMPLATE, TEXT, USER
from llama_lib.data.chat.store import Store, stored
from llama_lib.data.sources import Source
from llama_lib.errors import LlamaLibError, RunError
from tests.data.chat.conftest import chat, sized, words, write_records

# Says when it begins to encode, and takes its time: `pause` seconds for each batch.
ENCODE = """
import sys, time
from pathlib import Path
from llama_lib.data.chat import encode, store
from llama_lib.data.sources import Source
encode._PART_BYTES = 300
pause, tokenizer, cache, *files = sys.argv[1:]
items = encode._items
def slowly(*arguments):
    for item in items(*arguments):
        time.sleep(float(pause))
        yield item
encode._items = slowly
build = store._build
def told(*arguments):
    print("encodes", flush=True)
    build(*arguments)
store._build = told
sources = [Source(Path(file).stem, (Path(file),)) for file in files]
found = store.stored(sources, tokenizer, cache, workers=1)
print(sum(map(len, found.sources.values())))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    folder = tmp_path_factory.mktemp("data")
    found = []
    for name in "ab":
        path = folder / f"{name}.jsonl"
        records = [sized(10 + n % 30, first=n) for n in range(100)]
        write_records(path, records)
        found.append(Source(name, (path,)))
    return found


def start(pause: float, tokenizer: Path, cache: Path, sources: list[Source]) -> subprocess.Popen:
    files = [str(path) for source in sources for path in source.files]
    return subprocess.Popen(
        [sys.executable, "-c", ENCODE, str(pause), str(tokenizer), str(cache), *files],
        env={**os.environ, "OMP_NUM_THREADS": "1", "USE_TORCH": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )


def stores_in(cache: Path) -> list[Path]:
    return sorted((cache / "conversations").iterdir())


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_is_kept_of_a_conversation(tmp_path: Path, chatml_folder: Path) -> None:
    records = [chat("w1 w2", "w3"), {"text": "w7 w8"}, chat("w4", "w5 w6")]
    path = Path(write_records(tmp_path / "chats.jsonl", records))
    # The second is behind an empty line: lines are those of the file.
    path.write_text(path.read_text().replace("\n", "\n\n", 1))
    found = stored([Source("chats", (path,))], str(chatml_folder), tmp_path / "cache")
    chats = found.sources["chats"]
    assert chats.ids.lengths.tolist() == [9, 3, 9]
    roles = [chats.roles.tokens(number).tolist() for number in range(3)]
    start, answer = [TEMPLATE, TEMPLATE], [ASSISTANT, ASSISTANT]
    assert roles == [
        [*start, USER, USER, USER, *start, *answer],
        [TEXT, TEXT, TEXT],
        [*start, USER, USER, *start, ASSISTANT, *answer],
    ]
    assert chats.about["number"].tolist() == [1, 3, 4]
    assert [chats.locate(n)[0].place(chats.locate(n)[1]) for n in (0, 1)] == [
        f"{path} line 1",
        f"{path} line 3",
    ]
    # The first token is no label.
    counts = [np.bincount(each[1:], minlength=len(ROLE_NAMES)).tolist() for each in roles]
    assert chats.about["labels"].tolist() == counts
    assert chats.roles.dtype == np.uint8 and chats.ids.dtype == np.uint16
    assert len(set(chats.about["hash"].tolist())) == 3


def test_a_store_is_made_once_and_anew_when_a_file_changes(
    tmp_path: Path, chatml_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(write_records(tmp_path / "chats.jsonl", [sized(10)]))
    source = [Source("chats", (path,))]
    stored(source, str(chatml_folder), tmp_path / "cache")
    write = store_module._write
    monkeypatch.setattr(store_module, "_write", None)
    stored(source, str(chatml_folder), tmp_path / "cache")
    monkeypatch.setattr(store_module, "_write", write)
    write_records(path, [sized(10), sized(11)])
    again = stored(source, str(chatml_folder), tmp_path / "cache")
    assert len(stores_in(tmp_path / "cache")) == 2 and len(again.sources["chats"]) == 2


def test_bad_lines_that_were_skipped_once_are_errors_when_they_are_not(
    tmp_path: Path, chatml_folder: Path
) -> None:
    path = Path(write_records(tmp_path / "chats.jsonl", [sized(10), {"messages": []}]))
    source = [Source("chats", (path,))]
    stored(source, str(chatml_folder), tmp_path / "cache", skip_bad_lines=True)
    with pytest.raises(LlamaLibError, match=r"chats.jsonl line 2"):
        stored(source, str(chatml_folder), tmp_path / "cache")


def test_two_processes_give_the_bytes_of_one(
    tmp_path: Path, chatml_folder: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_lib.data.chat.encode._WORKER_BYTES", 1)
    monkeypatch.setattr("llama_lib.data.chat.encode._PART_BYTES", 300)
    started = []
    begin = store_module.encode_files
    monkeypatch.setattr(
        store_module,
        "encode_files",
        lambda files, encoding, workers: started.append(workers) or begin(files, encoding, workers),
    )
    results = []
    for workers in (1, 2):
        stored(sources, str(chatml_folder), tmp_path / str(workers), workers)
        results.append(files_of(*stores_in(tmp_path / str(workers))))
    assert started == [1, 2] and results[0] == results[1]
    assert {"ids/a.bin", "roles/b.idx", "about/a.bin", "manifest.json"} <= results[0].keys()


def test_killed_while_encoding_and_made_whole_by_the_next(
    tmp_path: Path, chatml_folder: Path, sources: list[Source]
) -> None:
    """The next are two at once, of which one encodes and the other waits."""
    stored(sources, str(chatml_folder), tmp_path / "expected")
    [expected] = stores_in(tmp_path / "expected")
    cache = tmp_path / "cache"
    process = start(0.05, chatml_folder, cache, sources)
    written = [cache / "conversations" / f"{expected.name}.work-{expected.name[:8]}/ids/b.bin"]
    deadline = time.monotonic() + 120
    while not written[0].exists() and time.monotonic() < deadline:
        assert process.poll() is None, "was killed too late to show anything"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert written[0].exists() and not (cache / "conversations" / expected.name).exists()
    both = [start(0.01, chatml_folder, cache, sources) for _ in range(2)]
    said = [process.communicate(timeout=180)[0].split() for process in both]
    assert sorted(said) == [["200"], ["encodes", "200"]]
    assert files_of(cache / "conversations" / expected.name) == files_of(expected)
    assert [path.name for path in (cache / "conversations").iterdir()] == [expected.name]


def test_damaged_files_are_told(tmp_path: Path, chatml_folder: Path, sources: list[Source]) -> None:
    cache = tmp_path / "cache"
    for name in ("ids/a.bin", "roles/a.idx", "about/b.bin", "manifest.json"):
        stored(sources, str(chatml_folder), cache)
        [path] = stores_in(cache)
        file = path / name
        content = file.read_bytes()
        file.write_bytes(content[:-7])
        with pytest.raises(RunError, match=r"damaged|missing"):
            Store.open(path, sources)
        file.write_bytes(content)
    facts = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**facts, "version": 0}))
    with pytest.raises(RunError, match="version 0"):
        stored(sources, str(chatml_folder), cache)


def test_those_who_wait_end_as_the_one_they_waited_for(
    tmp_path: Path, chatml_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(write_records(tmp_path / "chats.jsonl", [sized(10), {"messages": []}]))
    source = [Source("chats", (path,))]
    reports = []
    monkeypatch.setattr(
        "llama_lib.data.once.Turn.report", lambda turn, **state: reports.append(state)
    )
    with pytest.raises(LlamaLibError):
        stored(source, str(chatml_folder), tmp_path / "cache")
    assert f"{path} line 2" in reports[-1]["failed"][0]
    assert not list((tmp_path / "cache" / "conversations").iterdir()), "something is left over"


def test_a_full_disk_is_told(
    tmp_path: Path, chatml_folder: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.IndexedWriter, "write", full)
    with pytest.raises(RunError, match=r"the disk of .* is full: free space"):
        stored(sources, str(chatml_folder), tmp_path / "cache")
    assert not list((tmp_path / "cache" / "conversations").iterdir())


def test_words_are_tokens(chatml_folder: Path) -> None:
    """What the lengths in these tests rest on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chatml_folder)
    assert len(tokenizer(words(17))["input_ids"]) == 17
    assert len(tokenizer.apply_chat_template(sized(23)["messages"])) == 23
