"""Records of every shape and kind of file are the same conversations; bad ones are named."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llama_lib.data.bad_records import BadRecord
from llama_lib.data.chat.messages import Example, Message
from llama_lib.data.chat.records import ExampleFile, example_of
from llama_lib.data.parts import parts_of
from llama_lib.errors import UserError

SHARED = Path(__file__).parents[4] / "shared" / "data"
ASK, ANSWER, RULE = Message("user", "Why?"), Message("assistant", "So."), Message("system", "Rule.")
OPENAI = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"messages": OPENAI}, "conversation"),
        ({"messages": SHAREGPT}, "conversation"),
        ({"conversations": OPENAI, "id": "x"}, "conversation"),
        ({"conversations": SHAREGPT}, "conversation"),
        ({"prompt": "Why?", "completion": "So."}, "completion"),
        ({"instruction": "Why?", "input": "", "output": "So."}, "alpaca"),
        ({"instruction": "Why?", "output": "So.", "history": []}, "alpaca"),
        # What datasets keep beside the conversation does not decide.
        ({"prompt": "Why?", "messages": OPENAI, "text": "### Why? So."}, "conversation"),
        ({"instruction": "Why?", "input": None, "output": "So.", "text": "Below ..."}, "alpaca"),
    ],
)
def test_every_shape_is_one_conversation(record: dict[str, Any], kind: str) -> None:
    assert example_of(record) == Example((ASK, ANSWER), kind=kind)
    for nothing in (None, "", " \n"):
        assert example_of({**record, "system": nothing}) == Example((ASK, ANSWER), kind=kind)
    # The template for completions has no place for a system turn.
    kind = "conversation" if kind == "completion" else kind
    assert example_of({**record, "system": "Rule."}) == Example((RULE, ASK, ANSWER), kind=kind)


def test_plain_text() -> None:
    example = example_of({"text": " as it is \n", "meta": 1})
    assert example == Example(text=" as it is \n", kind="text")


def test_alpaca_input_follows_the_instruction() -> None:
    record = {"instruction": "Add.", "input": "3 and 4", "output": "7"}
    assert example_of(record).messages[0].content == "Add.\n\n3 and 4"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("So.<|endoftext|>", "So."),
        ([{"type": "text", "text": "So.<|endoftext|>"}], "So."),
        (" So. <|endoftext|> \n", " So. "),
        ("So. \n", "So. \n"),
        ("a<|endoftext|><|endoftext|>", "a<|endoftext|>"),
        ("a <|endoftext|> b", "a <|endoftext|> b"),
    ],
)
def test_one_end_of_text_behind_an_answer_is_noise(completion: Any, answer: str) -> None:
    asked = {"role": "user", "content": "Why?"}
    for record in (
        {"prompt": "Why?", "completion": completion},
        {"instruction": "Why?", "output": completion},
        {"messages": [asked, {"role": "assistant", "content": completion}]},
        {"conversations": [asked, {"from": "gpt", "value": completion}]},
    ):
        assert example_of(record).messages == (ASK, Message("assistant", answer))
    assert example_of({"text": completion}).text == answer


TRL = {
    "prompt": [*OPENAI, {"role": "user", "content": "And?"}],
    "completion": [{"role": "assistant", "content": "Thus."}],
}


def test_prompts_and_completions_of_turns() -> None:
    """As TRL has them: what the assistant says in the prompt is not trained on."""
    told = Message("assistant", "So.", trained=False)
    talk = (ASK, told, Message("user", "And?"), Message("assistant", "Thus."))
    assert example_of(TRL) == Example(talk)
    assert example_of({**TRL, "system": "Rule.", "tools": []}) == Example((RULE, *talk))


@pytest.mark.parametrize("tools", [[{"type": "function"}], '[{"name": "f"}]'])
@pytest.mark.parametrize("column", ["tools", "functions"])
@pytest.mark.parametrize("record", [{"messages": OPENAI}, {"conversations": SHAREGPT}, TRL])
def test_tools_are_refused(record: dict[str, Any], column: str, tools: Any) -> None:
    with pytest.raises(BadRecord, match=f"it has `{column}`: calls of tools cannot be trained on"):
        example_of({**record, column: tools})
    for none in (None, [], "[]", " "):
        assert example_of({**record, column: none}) == example_of(record)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"prompt": "", "completion": "So."}, "`prompt` is empty"),
        ({"prompt": "Why?", "completion": " <|endoftext|>"}, "`completion` is empty"),
        ({"prompt": ["Why?"], "completion": "So."}, "`prompt` has a part that is no text: str"),
        ({"prompt": "Why?", "completion": None}, "`completion` is null, not a string"),
        ({**TRL, "completion": "Thus."}, "the conversation is str, expected a list of turns"),
        ({**TRL, "prompt": "And?"}, "the conversation is str, expected a list of turns"),
        ({"instruction": "Why?", "input": 3, "output": "So."}, "`input` is int, not a string"),
        ({"instruction": " ", "input": "x", "output": "So."}, "`instruction` is empty"),
        ({"instruction": "Why?", "output": ""}, "`output` is empty"),
        ({"instruction": "?", "output": "So.", "history": [["a", "b"]]}, "`history` is not read"),
        ({"text": " \n"}, "`text` is empty"),
        ({"text": {"a": 1}}, "`text` is dict, not a string"),
        ({"messages": OPENAI, "system": 7}, "`system` is int, not a string"),
        ({"messages": None, "text": "a"}, "the conversation is null, expected a list of turns"),
        ({"messages": "[]"}, "the conversation is str, expected a list of turns"),
        (["a"], "list instead of an object"),
        ({"prompt": "Why?", "chosen": "So."}, "no `messages`, `conversations`, `prompt` with "),
    ],
)
def test_what_is_wrong_with_a_record(record: object, told: str) -> None:
    with pytest.raises(BadRecord) as caught:
        example_of(record)
    assert str(caught.value).startswith(told)


RECORDS = [
    {"conversations": SHAREGPT, "id": "0"},
    {"conversations": [*SHAREGPT, {"from": "human", "value": "\u4f60\u597d?"}], "id": "1"},
    {"conversations": [{"from": "system", "value": "Rule."}, *SHAREGPT], "id": "2"},
]
EXAMPLES = [
    Example((ASK, ANSWER)),
    Example((ASK, ANSWER), cut_turns=1),
    Example((RULE, ASK, ANSWER)),
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def tables(folder: Path, table: pa.Table) -> list[Path]:
    """The same table as parquet and as both formats of arrow, in several batches."""
    paths = [folder / "rows.parquet", folder / "stream.arrow", folder / "file.arrow"]
    pq.write_table(table, paths[0], row_group_size=2)
    with pa.ipc.new_stream(paths[1], table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pa.ipc.new_file(paths[2], table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return paths


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.jsonl", LINES, [1, 2, 3]),
        ("blank.jsonl", LINES.replace(b"\n", b"\n\n"), [1, 3, 5]),
        ("a.jsonl.gz", gzip.compress(LINES), [1, 2, 3]),
        ("a.jsonl.zst", zstandard.compress(LINES), [1, 2, 3]),
        ("lines.json", LINES, [1, 2, 3]),
        ("array.json", json.dumps(RECORDS).encode(), [1, 1, 1]),
        ("pretty.json", json.dumps(RECORDS, indent=1).encode(), [2, 15, 32]),
        ("pretty.json.gz", gzip.compress(json.dumps(RECORDS, indent=1).encode()), [2, 15, 32]),
    ],
)
def test_every_kind_of_file(tmp_path: Path, name: str, content: bytes, numbers: list[int]) -> None:
    reader = ExampleFile(written(tmp_path, name, content))
    assert list(reader) == list(zip(numbers, EXAMPLES, strict=True))
    assert reader.bad == 0
    assert reader.position == reader.size


def test_tables_of_turns(tmp_path: Path) -> None:
    for path in tables(tmp_path, pa.Table.from_pylist(RECORDS)):
        assert list(ExampleFile(path)) == list(zip([1, 2, 3], EXAMPLES, strict=True))


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"messages": [OPENAI], "prompt": ["x"], "score": [0.5]}, "conversation"),
        ({"messages": [OPENAI], "tools": ["[]"], "functions": [None]}, "conversation"),
        # A Sequence of dicts, as Hugging Face's datasets keep it.
        ({"conversations": [{"from": ["human", "gpt"], "value": ["Why?", "So."]}]}, "conversation"),
        ({"prompt": [OPENAI[:1]], "completion": [OPENAI[1:]]}, "conversation"),
        ({"prompt": ["Why?"], "completion": ["So.<|endoftext|>"]}, "completion"),
        ({"output": ["So."], "input": [None], "instruction": ["Why?"]}, "alpaca"),
        ({"output": ["So."], "input": [""], "instruction": ["Why?"], "history": [[]]}, "alpaca"),
    ],
)
def test_tables_of_every_shape(tmp_path: Path, columns: dict[str, Any], kind: str) -> None:
    with_system = "conversation" if kind == "completion" else kind
    for system, expected in (
        ("Rule.", Example((RULE, ASK, ANSWER), kind=with_system)),
        (None, Example((ASK, ANSWER), kind=kind)),
    ):
        for path in tables(tmp_path, pa.table({**columns, "system": [system]})):
            assert list(ExampleFile(path)) == [(1, expected)]


def test_text_of_a_table(tmp_path: Path) -> None:
    for path in tables(tmp_path, pa.table({"text": pa.array(["a", "b"]).dictionary_encode()})):
        texts = [Example(text=text, kind="text") for text in "ab"]
        assert list(ExampleFile(path)) == [(1, texts[0]), (2, texts[1])]


def test_only_needed_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[str]] = []
    plainly = pq.ParquetFile.iter_batches

    def noted(file: Any, *arguments: Any, columns: list[str], **others: Any) -> Any:
        read.append(columns)
        return plainly(file, *arguments, columns=columns, **others)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    columns = {"text": ["x"], "system": ["Rule."], "prompt": ["Why?"], "messages": [OPENAI]}
    assert list(ExampleFile(tables(tmp_path, pa.table(columns))[0])) == [
        (1, Example((RULE, ASK, ANSWER)))
    ]
    assert read == [["messages", "system"]]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"messages": ["[]"]}, "the column `messages` holds string, expected lists of turns"),
        ({"messages": [["a"]]}, "holds list<element: string>, expected lists of turns"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "expected lists of turns"),
        ({"prompt": [1], "completion": ["a"]}, "the column `prompt` holds int64, expected strings"),
        ({"prompt": ["a"], "completion": [None]}, "`completion` holds null, expected strings"),
        ({"input_ids": [[1, 2]]}, "found input_ids. Expected lines like one of these"),
    ],
)
def test_tables_that_hold_something_else(
    tmp_path: Path, columns: dict[str, Any], told: str
) -> None:
    for path in tables(tmp_path, pa.table(columns)):
        for look in (ExampleFile.check_table, list):
            with pytest.raises(UserError) as caught:
                look(ExampleFile(path))
            assert told.replace("element", "item") in str(caught.value).replace("element", "item")
            assert str(path) in str(caught.value)


def test_a_file_of_no_known_shape_shows_all_that_are(tmp_path: Path) -> None:
    record = {"question": "Why?", "answer": "So."}
    for path in (
        written(tmp_path, "a.jsonl", json.dumps(record).encode()),
        written(tmp_path, "a.json", json.dumps([record]).encode()),
        *tables(tmp_path, pa.Table.from_pylist([record])),
    ):
        with pytest.raises(UserError) as caught:
            list(ExampleFile(path))
        message, *lines = str(caught.value).split("\n")
        assert f"{path} has no `messages`, `conversations`, `prompt` with `completion`, " in message
        assert "found answer, question. Expected lines like one of these:" in message
        # Each of them is right.
        shapes = [example_of(json.loads(line)) for line in lines]
        assert [shape.kind for shape in shapes] == [
            *("conversation", "conversation", "completion", "alpaca", "text")
        ]


BAD = [
    RECORDS[0],
    {"conversations": [SHAREGPT[1]]},
    {"conversations": [*SHAREGPT, {"from": "tool", "value": "x"}]},
    RECORDS[2],
]


def test_bad_records_are_named_by_file_and_line_or_counted(tmp_path: Path) -> None:
    lines = [json.dumps(record).encode() for record in BAD]
    jsonl = written(tmp_path, "a.jsonl", b"\n".join([*lines, b'{"cut', b'{"a": 1}']))
    array = written(tmp_path, "a.json", json.dumps(BAD, indent=1).encode())
    first = "turn 1: the assistant speaks first, expected the user"
    last = "turn 3: unknown role 'tool'"
    cases = [(jsonl, "line 2", "line 6: no `messages`", 4), (array, "line 15", "line 23", 2)]
    for path in tables(tmp_path, pa.Table.from_pylist(BAD)):
        cases.append((path, "row 2", f"row 3: {last}", 2))
    for path, at, last_bad, bad in cases:
        with pytest.raises(UserError) as caught:
            list(ExampleFile(path))
        assert f"{path} {at}: {first}" in str(caught.value)
        assert "--skip_bad_lines" in str(caught.value)
        reader = ExampleFile(path, skip_bad_lines=True)
        assert [example for _, example in reader] == [EXAMPLES[0], EXAMPLES[2]]
        assert reader.bad == bad
        assert reader.last_bad.startswith(last_bad)


def test_file_of_bad_records_alone_is_an_error_even_when_they_are_skipped(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", json.dumps(BAD[1]).encode())
    with pytest.raises(
        UserError, match=r"all 1 records are bad; the last one: line 1: turn 1"
    ) as e:
        list(ExampleFile(path, skip_bad_lines=True))
    assert '{"prompt": ' in str(e.value)


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    line = rb'{"prompt": "a", "completion": "b\ud800"}'
    with pytest.raises(UserError, match=r"line 1: `completion`: half a surrogate pair at charac"):
        list(ExampleFile(written(tmp_path, "a.jsonl", line)))


def test_turns_of_a_table_that_are_not_utf8(tmp_path: Path) -> None:
    def strings(*values: bytes) -> pa.Array:
        return pa.array(values).view(pa.string())

    columns = {
        "prompt": strings(b"a", b"b", b"c"),
        "completion": strings(b"d", b"\xff", b"e"),
        "not read": strings(b"\xff", b"\xff", b"\xff"),
    }
    for path in tables(tmp_path, pa.table(columns)):
        reader = ExampleFile(path, skip_bad_lines=True)
        assert [number for number, _ in reader] == [1, 3]
        assert reader.last_bad == "row 2: `completion` is not UTF-8 at byte 0"


@pytest.mark.parametrize("name", ["a.jsonl", "rows.parquet"])
def test_parts_give_the_same_numbers_as_the_file(tmp_path: Path, name: str) -> None:
    records = [
        {"prompt": f"{number}?", "completion": "x" * (number % 7 + 1)} for number in range(40)
    ]
    path = written(tmp_path, name, b"".join(json.dumps(r).encode() + b"\n" for r in records))
    if name.endswith("parquet"):
        tables(tmp_path, pa.Table.from_pylist(records))
    parts = parts_of(path, 100)
    assert len(parts) > 3
    found = [pair for part in parts for pair in ExampleFile(path, part=part)]
    assert found == list(ExampleFile(path))
    assert [number for number, _ in found] == list(range(1, 41))
    assert [int(example.messages[0].content[:-1]) for _, example in found] == list(range(40))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_published_conversations_are_all_read() -> None:
    sharegpt = ExampleFile(SHARED / "conversations" / "sharegpt.json")
    examples = [example for _, example in sharegpt]
    records = json.loads(sharegpt.path.read_text())
    assert len(examples) == len(records) > 100
    for example, record in zip(examples, records, strict=True):
        spoken = [turn["value"] for turn in record["conversations"]]
        assert [message.content for message in example.messages] == spoken
    self_instruct = list(ExampleFile(SHARED / "self_instruct" / "train.jsonl"))
    assert {example.kind for _, example in self_instruct} == {"completion"}
    assert not any("<|endoftext|>" in example.messages[1].content for _, example in self_instruct)
