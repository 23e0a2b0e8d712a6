"""The built-in conversations: what they ask and answer, and that they are the same everywhere."""

import collections
import hashlib
import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from llama_lib.data.chat.sample import sample_conversations, write_sample_conversations
from llama_lib.errors import UserError

ROOT = Path(__file__).parents[3]
_PRINT = (
    "import hashlib, sys\n"
    "from pathlib import Path\n"
    "from llama_lib.data.chat.sample import write_sample_conversations\n"
    "(path,) = write_sample_conversations(Path(sys.argv[1]))\n"
    "print(hashlib.sha256(path.read_bytes()).hexdigest())\n"
)


def test_answers_are_the_words_of_the_standard_library() -> None:
    answered = 0
    for record in sample_conversations():
        turns = [m for m in record["messages"] if m["role"] != "system"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            assert (question["role"], answer["role"]) == ("user", "assistant")
            name = question["content"].removeprefix("What does ").removeprefix("And ")
            module, _, function = name.removesuffix(" do?").removesuffix("?").partition(".")
            documented = inspect.getdoc(getattr(importlib.import_module(module), function))
            assert documented is not None
            assert answer["content"] == documented.splitlines()[0]
            answered += 1
    assert answered == 576


def test_shapes_of_the_conversations() -> None:
    conversations = [record["messages"] for record in sample_conversations()]
    assert len({json.dumps(c) for c in conversations}) == len(conversations) == 192
    with_system = [c for c in conversations if c[0]["role"] == "system"]
    assert [len(c) for c in with_system] == [7] * 12
    lengths = collections.Counter(len(c) for c in conversations if c[0]["role"] == "user")
    # Alone, then dialogues of two to five questions.
    assert lengths == {2: 36, 4: 36, 6: 36, 8: 36, 10: 36}
    # One question has one answer, or nobody could learn them all.
    answers: dict[str, set[str]] = {}
    for conversation in conversations:
        for question, answer in itertools.pairwise(conversation):
            if answer["role"] == "assistant":
                answers.setdefault(question["content"], set()).add(answer["content"])
    assert all(len(different) == 1 for different in answers.values())
    for message in (m for c in conversations for m in c):
        assert message["content"].isascii() and message["content"].strip() == message["content"]


def test_every_function_is_asked_about_first_second_and_third() -> None:
    """Without a system message: a talk went wrong at its second question once."""
    places: dict[str, set[int]] = {}
    wordings: dict[str, set[str]] = {}
    followed: dict[str, set[str]] = {}
    for record in sample_conversations():
        if record["messages"][0]["role"] == "system":
            continue
        questions = [m["content"] for m in record["messages"] if m["role"] == "user"]
        names = [re.findall(r"\w+\.\w+", question)[0] for question in questions]
        assert len({name.partition(".")[0] for name in names}) == len(names)
        for place, (name, question) in enumerate(zip(names, questions, strict=True)):
            places.setdefault(name, set()).add(place)
            if place == 1:
                wordings.setdefault(name, set()).add(question)
        for name, following in itertools.pairwise(names):
            followed.setdefault(name, set()).add(following)
    assert len(places) == 36
    assert all(found >= {0, 1, 2} for found in places.values())
    assert all(found == {f"What does {n} do?", f"And {n}?"} for n, found in wordings.items())
    assert all(len(found) == 4 for found in followed.values())


def test_written_once_and_mended_when_changed(tmp_path: Path) -> None:
    (path,) = write_sample_conversations(tmp_path)
    assert path == tmp_path / "conversations.jsonl"
    content, written = path.read_bytes(), path.stat().st_mtime_ns
    assert [json.loads(line) for line in content.splitlines()] == list(sample_conversations())
    write_sample_conversations(tmp_path)
    assert path.stat().st_mtime_ns == written
    path.write_text("other")
    write_sample_conversations(tmp_path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("flags", [["-OO"], ["-X", "utf8=0"], ["-E", "-s"]])
def test_the_same_however_python_is_started(flags: list[str], tmp_path: Path) -> None:
    (here,) = write_sample_conversations(tmp_path / "here")
    command = [sys.executable, *flags, "-c", _PRINT, str(tmp_path / "there")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"LC_ALL": "C"})
    assert done.stdout.strip() == hashlib.sha256(here.read_bytes()).hexdigest(), done.stderr


def test_no_word_of_this_machine(tmp_path: Path) -> None:
    (path,) = write_sample_conversations(tmp_path)
    text = path.read_text()
    for place in (sys.prefix, sys.base_prefix, str(Path.home()), str(ROOT)):
        assert place not in text


def test_a_python_without_its_source_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match=r"base64\.py.*-d FILE"):
        next(sample_conversations())
