"""Parts of files against whole files: numbers, counts, errors; what makes conversations equal."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_lib.data.chat.counts import Bad, Counts, Seen, reason_of
from llama_lib.data.chat.encode import (
    Encoding,
    conversation_hash,
    encode_files,
    group_hash,
)
from llama_lib.data.chat.messages import Example, Message
from llama_lib.data.chat.part_reader import lines_of
from llama_lib.data.chat.records import ExampleFile
from llama_lib.data.parts import Part
from llama_lib.data.tokenizer import save_tokenizer
from llama_lib.errors import UserError
from tests.data.chat.conftest import chat, word_tokenizer, words

# Nothing stands between a prompt and its answer.
TEMPLATE = (
    "{%- if messages | length > 2 -%}{{- raise_exception('one answer only') -}}{%- endif -%}"
    "{%- for message in messages -%}{{- message.content -}}"
    "{%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}{%- endfor -%}"
)
UNANSWERED = {"messages": [*chat("w1 ", "w2")["messages"], {"role": "user", "content": "w3"}]}


@pytest.fixture
def plain(tmp_path: Path) -> Encoding:
    """Refuses two exchanges when it encodes, which is later than reading."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    save_tokenizer(tokenizer, tmp_path / "plain")
    return Encoding(str(tmp_path / "plain"), str(tmp_path / "cache"), skip_bad_lines=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_lib.data.chat.encode._WORKER_BYTES", 1)
    monkeypatch.setattr("llama_lib.data.chat.encode._PART_BYTES", 150)
    monkeypatch.setattr("llama_lib.data.chat.encode._BATCH_CHARACTERS", 20)


def many_records() -> list[dict[str, Any]]:
    source = np.random.RandomState(0)
    kinds = [
        chat("w1 ", "w2"),
        chat("w1 ", "w2", "w3 ", "w4"),  # refused by the template
        UNANSWERED,
        {"messages": [{"role": "tool", "content": "w1"}]},
        {"text": words(30)},
        chat("w1 <|im_end|> </s> ", "w2"),  # </s> is a token of its own
        chat("w1", "w2"),  # becomes one word, w1w2
    ]
    return [kinds[int(number)] for number in source.randint(0, len(kinds), 150)]


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    """Lines with blank ones among them, or the rows of a table in groups."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [{"messages": None, **record} for record in records if "text" not in record]
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
        return path
    lines = "".join(
        "\n" * (number % 5 == 0) + json.dumps(record) + "\n"
        for number, record in enumerate(records)
    ).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else b"\xef\xbb\xbf" + lines)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("workers", [1, 2])
def test_numbers_are_those_of_the_file(
    tmp_path: Path, plain: Encoding, name: str, workers: int
) -> None:
    path = written(tmp_path / name, many_records())
    expected = Counts()
    numbers, refused = [], []
    file = ExampleFile(path, skip_bad_lines=True)
    for number, example in file:
        if len(example.messages) > 2:
            refused.append(number)
            continue
        numbers.append(number)
        if example.cut_turns:
            expected.cut_turns.add(Seen(1, number))
        contents = [turn.content for turn in example.messages]
        if contents == ["w1", "w2"]:
            expected.merged.add(Seen(1, number))
        if any("</s>" in content for content in contents):
            expected.specials.add(Seen(1, number))
    last_bad = max(refused[-1], int(re.findall(r"\d+", file.last_bad)[0]))
    # Twice the same file: its numbers begin anew.
    batches = list(encode_files([path, path], plain, workers))
    ends = [place for place, batch in enumerate(batches) if batch.is_last]
    assert len(ends) == 2 and ends[0] > 3
    for batches_of in (batches[: ends[0] + 1], batches[ends[0] + 1 :]):
        assert [n for batch in batches_of for n in batch.about["number"].tolist()] == numbers
        counts = Counts()
        for batch in batches_of:
            counts.add(batch.counts)
        assert counts.num_bad == file.bad + len(refused)
        assert counts.cut_turns == expected.cut_turns
        assert counts.merged == expected.merged and expected.merged.count
        assert counts.specials == expected.specials and expected.specials.count
        roles = [bad for bad in counts.bad.values() if "unknown role 'tool'" in bad.message]
        assert [bad.count for bad in roles] == [file.bad]
        assert counts.last_bad[0] == last_bad
        positions = [batch.position for batch in batches_of]
        assert positions == sorted(positions) and positions[-1] == path.stat().st_size


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("bad", [chat("w1 ", "w2", "w3 ", "w4"), {"messages": 3}])
def test_an_error_far_in_a_file_names_its_line(
    tmp_path: Path, plain: Encoding, workers: int, bad: dict[str, Any]
) -> None:
    records = [chat("w1 ", "w2")] * 60
    records[43] = bad
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n" + "".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(UserError, match=r"a.jsonl line 46: .*--skip_bad_lines"):
        list(encode_files([path], Encoding(plain.tokenizer, plain.cache_dir, False), workers))


def test_lines_of_a_part_are_those_that_begin_in_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content in (b"ab\nc\n\ndef", b"ab\nc\n\ndef\n", b"\n", b"x"):
        path.write_bytes(content)
        begins = [0, *(at + 1 for at, byte in enumerate(content) if byte == 10)]
        for start in range(len(content) + 1):
            for stop in range(start, len(content) + 1):
                expected = sum(start <= begin < stop for begin in begins)
                assert lines_of(Part(path, start, stop)) == expected


def test_reasons_are_counted_without_what_differs() -> None:
    counts = Counts()
    counts.add_bad(9, "turn 3: unknown role 'tool'; expected user")
    counts.add_bad(4, 'turn 1: unknown role "it\'s"; expected user')
    counts.add_bad(5, "turn 2 is empty")
    later = Counts()
    later.add_bad(2, "turn 8 is empty")
    later.shift(20)
    counts.add(later)
    assert list(counts.bad.values()) == [
        Bad(2, 4, 'turn 1: unknown role "it\'s"; expected user'),
        Bad(2, 5, "turn 2 is empty"),
    ]
    assert counts.last_bad == (22, "turn 8 is empty") and counts.num_bad == 4
    assert reason_of("the tokenizer's role isn't 'a' or 'b'") == (
        "the tokenizer's role isn't '...' or '...'"
    )


def test_no_more_reasons_are_kept_than_can_be_read() -> None:
    counts = Counts()
    for number in range(3000):
        counts.add_bad(number + 1, "found " + "x" * number)
    assert len(counts.bad) == 1001 and counts.num_bad == 3000


def test_what_makes_conversations_equal() -> None:
    def talk(*turns: tuple[str, str]) -> Example:
        return Example(tuple(Message(role, content) for role, content in turns))

    one = talk(("user", "a"), ("assistant", "b"))
    blanks = talk(("user", " a\n"), ("assistant", "b "))
    other_answer = talk(("user", "a"), ("assistant", "c"))
    longer = talk(("user", "a"), ("assistant", "b"), ("user", "d"), ("assistant", "e"))
    other_role = talk(("system", "a"), ("assistant", "b"))
    told = talk(("system", "s"), ("user", "a"), ("assistant", "b"))
    assert conversation_hash(one) == conversation_hash(blanks)
    different = [one, other_answer, longer, other_role, told, Example(text="a")]
    assert len(set(map(conversation_hash, different))) == len(different)
    assert {group_hash(each) for each in (one, blanks, other_answer, longer)} == {group_hash(one)}
    assert len({group_hash(one), group_hash(told), group_hash(Example(text="a"))}) == 3
    assert group_hash(Example(text="a")) == group_hash(Example(text="a\n"))
