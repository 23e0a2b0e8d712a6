"""The rows of a fine-tuning run against each conversation alone, and what a user is told."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from llama_lib.data.chat.labels import label_weights
from llama_lib.data.chat.records import example_of
from llama_lib.data.chat.templates import TEMPLATES, ChatTemplate, use_template
from llama_lib.data.chat.training import ChatRequest, chat_data, kinds_of
from llama_lib.data.loader import IGNORED, BatchLoader, Row
from llama_lib.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from llama_lib.data.training_data import Passage, TrainingData
from llama_lib.errors import UserError
from tests.data.chat.conftest import (
    Request,
    chat,
    sized,
    word_tokenizer,
    words,
    write_records,
)

SHARED = Path(__file__).parents[4] / "shared" / "data"


def rows_of(data: TrainingData, epochs: int = 1) -> list[Row]:
    assert data.num_rows is not None
    samples = range(data.num_rows(epochs))
    return data.open_rows({}).rows(samples, samples)[0]


def pieces_of(row: Row) -> list[slice]:
    """The conversations of a row; the last piece is padding, if there is any."""
    if row.documents is None:
        return [slice(0, sum(row.tokens.values()))]
    ends = [*(np.flatnonzero(np.diff(row.documents)) + 1).tolist(), len(row.ids)]
    pieces = [slice(*ends) for ends in zip([0, *ends], ends, strict=False)]
    return pieces[: len(pieces) - (sum(row.tokens.values()) < len(row.ids))]


def passages_of(data: TrainingData, epochs: int = 1) -> list[list[Passage]]:
    assert data.num_rows is not None
    return data.passages(range(data.num_rows(epochs)), {})


def mixed_records(count: int) -> list[dict[str, Any]]:
    """Conversations of all lengths, one to three exchanges, some with a system turn."""
    source = np.random.RandomState(count)
    records = []
    for number in range(count):
        turns = [words(int(source.randint(1, 12)), number + t) for t in range(2 * (number % 3) + 2)]
        records.append(chat(*turns, system=words(3, number) if number % 4 == 0 else None))
    return records


def labels_alone(folder: Path, record: dict, request: ChatRequest) -> tuple[list[int], list[float]]:
    """The ids and label weights of one conversation, made without any of the store."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = ChatTemplate(tokenizer).encode(example_of(record))
    ids = tokenizer.apply_chat_template(record["messages"])
    assert encoded.ids.tolist() == ids
    weights = label_weights(encoded.roles, request.loss_role, request.other_role_weight)
    return ids[: request.max_length], weights[: request.max_length].tolist()


def test_golden_packing(tmp_path: Path, request_of: Request) -> None:
    # A text of n tokens is n - 1 words and the end.
    records = [{"text": words(length - 1)} for length in (5, 3, 2, 9, 12, 7)]
    path = write_records(tmp_path / "golden.jsonl", records)
    cut = chat_data(request_of(path, max_length=10))
    rows = [sorted(passage.length for passage in row) for row in passages_of(cut)]
    assert sorted(rows) == [[2, 5], [3, 7], [9], [10]]
    assert cut.lines[1:] == [
        "cut 1 of 6 conversations to --max_length 10: 2 tokens at their ends are not trained on "
        f"(first: {path} line 5)",
        "packed 6 conversations into 4 rows of 10, 90.0% full: 1.5 times fewer rows than padding",
    ]
    dropped = chat_data(request_of(path, max_length=10, overlong="drop"))
    rows = [sorted(passage.length for passage in row) for row in passages_of(dropped)]
    assert sorted(rows) == [[2, 5], [3, 7], [9]]
    assert (
        f"dropped 1 of 6 conversations: more tokens than --max_length 10 (first: {path} line 5)"
        in dropped.lines
    )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    "loss", [("assistant", 0.0), ("user", 0.0), ("all", 0.0), ("assistant", 0.25)]
)
def test_every_conversation_is_whole_in_one_row_with_its_own_labels(
    tmp_path: Path, request_of: Request, chatml_folder: Path, packing: bool, loss: tuple
) -> None:
    records = mixed_records(60)
    path = write_records(tmp_path / "chats.jsonl", records)
    request = request_of(
        path, packing=packing, max_length=48, loss_role=loss[0], other_role_weight=loss[1]
    )
    data = chat_data(request)
    alone = [labels_alone(chatml_folder, record, request) for record in records]
    assert any(len(ids) == 48 for ids, _ in alone), "none is cut"
    rows, passages = rows_of(data, 2), passages_of(data, 2)
    count = len(rows) // 2
    for epoch in (slice(0, count), slice(count, None)):
        seen: Counter[int] = Counter()
        for row, parts in zip(rows[epoch], passages[epoch], strict=True):
            weights = row.weights if row.weights is not None else (row.labels != IGNORED) * 1.0
            pieces = pieces_of(row)
            assert len(pieces) == len(parts) and (packing or len(parts) == 1)
            for piece, part in zip(pieces, parts, strict=True):
                ids, expected = alone[part.number - 1]
                assert row.ids[piece].tolist() == ids
                assert weights[piece].tolist() == expected
                labels = np.where(np.array(expected) > 0, ids, IGNORED)
                assert row.labels[piece].tolist() == labels.tolist()
                assert (part.source, part.file, part.start) == ("chats", "chats.jsonl", 0)
                seen[part.number] += 1
            filled = pieces[-1].stop
            assert filled == sum(row.tokens.values()) == sum(part.length for part in parts)
            assert (row.labels[filled:] == IGNORED).all() and not weights[filled:].any()
            assert (row.documents is None) == (not packing)
        assert seen == Counter(range(1, 61))
    assert [part for row in passages[:count] for part in row] != [
        part for row in passages[count:] for part in row
    ]
    assert max(map(len, passages)) > 1 or not packing
    assert all((row.weights is None) == (loss[1] == 0) for row in rows)


@pytest.mark.parametrize("other_role_weight", [0.0, 0.1])
def test_label_tokens_of_a_batch_are_known_to_a_rank_that_reads_a_part(
    tmp_path: Path, request_of: Request, other_role_weight: float
) -> None:
    path = write_records(tmp_path / "chats.jsonl", mixed_records(60))
    data = chat_data(request_of(path, max_length=40, other_role_weight=other_role_weight))
    source = data.open_rows({})
    for rank in range(2):
        step = BatchLoader(source, 8, dp_rank=rank, dp_size=2, accumulation=2).batch(1)
        rows, _ = source.rows([], step.samples)
        weights = [(row.labels != IGNORED) if row.weights is None else row.weights for row in rows]
        assert step.num_labels == pytest.approx(sum(float(each.sum()) for each in weights))
        # What a model predicts: the label behind each token, so not the first of a row.
        assert not any(each[0] for each in weights)
        assert [part.ids.shape for part in step.micro_batches] == [(2, 40), (2, 40)]
        assert all(
            (part.weights is None) == (other_role_weight == 0) for part in step.micro_batches
        )


def test_without_packing_each_row_is_padded(tmp_path: Path, request_of: Request) -> None:
    path = write_records(tmp_path / "chats.jsonl", [sized(n) for n in (10, 20, 64)])
    data = chat_data(request_of(path, packing=False))
    rows = rows_of(data)
    assert sorted(sum(row.tokens.values()) for row in rows) == [10, 20, 64]
    assert data.lines[-1] == "3 rows of 64 with one conversation, 49.0% full"
    assert chat_data(request_of(path)).lines[-1].startswith("packed 3 conversations into 2 rows")


def test_weights_are_shares_of_the_tokens(tmp_path: Path, request_of: Request) -> None:
    # Rows of the one are nearly empty without packing, those of the other nearly full.
    small = write_records(tmp_path / "small.jsonl", [sized(8, first=n) for n in range(40)])
    large = write_records(tmp_path / "large.jsonl", [sized(60, first=n) for n in range(40)])
    for packing in (True, False):
        data = chat_data(request_of(f"{small}:0.25", f"{large}:0.75", packing=packing))
        tokens: Counter[str] = Counter()
        for row in data.open_rows({}).rows([], range(1000))[0]:
            tokens.update(row.tokens)
        assert tokens["small"] / tokens.total() == pytest.approx(0.25, abs=0.01)
        assert data.repetitions is not None
        passes = data.repetitions(1000)
        assert passes["small"] == pytest.approx(tokens["small"] / 320, rel=0.05)


def test_a_number_of_conversations_is_drawn_from_those_that_stay(
    tmp_path: Path, request_of: Request
) -> None:
    records = [sized(10 if n % 2 else 30, first=n) for n in range(60)]
    path = write_records(tmp_path / "chats.jsonl", records)
    other = write_records(tmp_path / "other.jsonl", [sized(12)])

    def numbers(seed: int) -> list[int]:
        data = chat_data(request_of(f"{path}[12]", other, min_length=11, seed=seed))
        assert "dropped 18 of 61 conversations: more than the [N] of -d" in data.lines
        parts = [part for row in passages_of(data) for part in row]
        assert sum(part.source == "other" for part in parts) == 1
        return sorted(part.number for part in parts if part.source == "chats")

    first = numbers(1)
    assert len(first) == 12 and all(number % 2 for number in first)
    assert first == numbers(1) != numbers(2)


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, request_of: Request) -> None:
    records = [
        sized(20),
        sized(9),  # too short
        chat(words(40), words(5), words(40), words(5)),  # the second answer is cut off
        chat(words(70), words(3)),  # no answer left
        {"messages": [*sized(14)["messages"], {"role": "user", "content": "w1"}]},
        {"messages": [{"role": "user", "content": ""}]},  # bad
        sized(64),
        sized(65, answer=10),
    ]
    path = write_records(tmp_path / "chats.jsonl", records)
    data = chat_data(request_of(path, min_length=10, skip_bad_lines=True))
    assert data.lines == [
        "5 conversations, 226 tokens from 1 source(s), 22 of them trained on; held out 0 "
        "conversations, 0 tokens",
        f"left out 1 bad record(s) (first: {path} line 6): turn 1 (user) is empty",
        f"left out 1 turn(s) of users at the end that nobody answered (first: {path} line 5)",
        f"dropped 1 of 7 conversations: fewer tokens than --min_length 10 (first: {path} line 2)",
        "dropped 1 of 7 conversations: no trained token left within --max_length 64 (first: "
        f"{path} line 4)",
        "cut 2 of 7 conversations to --max_length 64: 39 tokens at their ends are not trained on "
        f"(first: {path} line 3)",
        "packed 5 conversations into 4 rows of 64, 88.3% full: 1.2 times fewer rows than padding",
    ]
    weighted = chat_data(request_of(path, other_role_weight=0.5, skip_bad_lines=True))
    assert "of them trained on, by their weights; held out" in weighted.lines[0]
    # The first answer of 5 + its end, then 1 + 1 each, then what is left of 10 + 1.
    assert data.open_rows({}).rows(range(4), [])[1] == 6 + 2 + 2 + 2 + 10


def test_bad_records_are_told_by_reason_the_most_frequent_first(
    tmp_path: Path, request_of: Request
) -> None:
    def turns(*roles: str) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": "w1"} for role in roles]}

    seven = [
        turns("tool"),
        turns("user", "user", "assistant"),
        turns("assistant", "user", "assistant"),
        {"messages": []},
        {"messages": 3},
        {"text": ""},
        turns("user"),
    ]
    records = [seven[0], sized(10)] + [turns(f"tool{n}") for n in range(8)]
    records += [record for n, record in enumerate(seven[1:]) for _ in range(7 - n)]
    one = write_records(tmp_path / "one.jsonl", records)
    two = write_records(tmp_path / "two.jsonl", [sized(11), *[seven[1]] * 3])
    lines = chat_data(request_of(one, two, skip_bad_lines=True)).lines
    told = [line for line in lines if line.startswith("left out")]
    assert [line.split(" bad record(s) ")[0] for line in told] == [
        f"left out {count}" for count in (10, 9, 6, 5, 4, 5)
    ]
    assert told[0].startswith(f"left out 10 bad record(s) (first: {one} line 11): turn 2: user af")
    assert told[1].startswith(f"left out 9 bad record(s) (first: {one} line 1): turn 1: unknown ro")
    assert told[5] == "left out 5 bad record(s) for 2 other reason(s)"


def test_the_first_is_that_of_the_first_batch(
    tmp_path: Path, request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_lib.data.chat.encode._PART_BYTES", 100)
    unanswered = {"messages": [*sized(14)["messages"], {"role": "user", "content": "w1"}]}
    special = chat("w1 <|im_end|>", "w2")
    records = [sized(10), sized(11), unanswered, special, unanswered, special]
    path = write_records(tmp_path / "chats.jsonl", records)
    lines = chat_data(request_of(path)).lines
    assert (
        "left out 2 turn(s) of users at the end that nobody answered "
        f"(first: {path} line 3)" in lines
    )
    assert (
        "warning: 2 conversation(s) hold the text of special tokens, which becomes these tokens "
        f"(first: {path} line 4)" in lines
    )


def test_tokens_joined_across_the_border_of_an_answer_are_warned_of(
    tmp_path: Path, request_of: Request
) -> None:
    tokenizer = word_tokenizer()
    # Nothing stands between a prompt and its answer.
    tokenizer.chat_template = (
        "{%- for message in messages -%}{{- message.content -}}"
        "{%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}{%- endfor -%}"
    )
    save_tokenizer(tokenizer, tmp_path / "joining")
    path = write_records(tmp_path / "chats.jsonl", [chat("w1 ", "w2"), chat("w1", "w2 w3")])
    other = write_records(tmp_path / "other.jsonl", [chat("w4", "w2 w3")])
    request = request_of(path, tokenizer=str(tmp_path / "joining"), eval_data=[other])
    lines = [line for line in chat_data(request).lines if "joins" in line]
    assert [line[:36] for line in lines] == [
        "warning: in 1 conversation(s) the to",
        "--eval_data: warning: in 1 conversat",
    ]
    assert lines[0].endswith(f"(first: {path} line 2)")
    assert lines[1].endswith(f"(first: {other} line 1)")


def test_labels_of_cut_conversations_are_those_of_their_rows(
    tmp_path: Path, request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_lib.data.chat.selection._CHUNK_TOKENS", 200)
    records = [sized(n, answer=n // 3, first=n) for n in range(40, 140, 7)]
    path = write_records(tmp_path / "chats.jsonl", records)
    for change in ({"loss_role": "all"}, {}, {"loss_role": "user", "other_role_weight": 0.25}):
        data = chat_data(request_of(path, **change))
        rows, samples = rows_of(data), range(data.num_rows(1))
        for sample, row in zip(samples, rows, strict=True):
            own = float((row.labels != IGNORED).sum() if row.weights is None else row.weights.sum())
            assert data.open_rows({}).rows([sample], [])[1] == own
    # With `all` every token but the first of each conversation is a label.
    whole = chat_data(request_of(path, loss_role="all"))
    tokens = sum(sum(row.tokens.values()) for row in rows_of(whole))
    every = whole.open_rows({}).rows(range(whole.num_rows(1)), [])[1]
    assert every == tokens - len(records)


def test_min_length_is_that_of_the_whole_conversation(tmp_path: Path, request_of: Request) -> None:
    path = write_records(tmp_path / "chats.jsonl", [sized(100, answer=60), sized(64)])
    data = chat_data(request_of(path, min_length=70))
    assert (
        f"dropped 1 of 2 conversations: fewer tokens than --min_length 70 (first: {path} line 2)"
        in data.lines
    )
    assert data.lines[0].startswith("1 conversations, 64 tokens")


def test_a_turn_of_weight_0_changes_the_identity_and_has_no_labels(
    tmp_path: Path, request_of: Request
) -> None:
    record = chat("w1", "w2", "w3", "w4")
    path = write_records(tmp_path / "chats.jsonl", [record])
    both = chat_data(request_of(path))
    record["messages"][1]["weight"] = 0
    write_records(tmp_path / "chats.jsonl", [record])
    one = chat_data(request_of(path))
    # An answer and its end each.
    assert both.open_rows({}).rows([0], [])[1] == 4 and one.open_rows({}).rows([0], [])[1] == 2
    assert both.identity != one.identity


def test_an_entry_with_a_weight_of_which_nothing_is_left_says_why(
    tmp_path: Path, request_of: Request
) -> None:
    one = write_records(tmp_path / "one.jsonl", [sized(20, first=n) for n in range(4)])
    two = write_records(tmp_path / "two.jsonl", [sized(n) for n in (10, 11, 30)])
    held = write_records(tmp_path / "held.jsonl", [sized(30)])
    with pytest.raises(UserError) as caught:
        chat_data(request_of(f"{one}:0.5", f"{two}:0.5", min_length=15, eval_data=[held]))
    assert str(caught.value).startswith(
        f"-d {two}:0.5: no conversation is left; of 3, 1: in --eval_data too, 2 have fewer tokens "
        "than --min_length 15. "
    )


def test_nothing_left_says_why(tmp_path: Path, request_of: Request) -> None:
    path = write_records(tmp_path / "chats.jsonl", [sized(20), sized(30), sized(70)])
    with pytest.raises(UserError) as caught:
        chat_data(request_of(path, min_length=25, max_length=27, overlong="drop"))
    assert str(caught.value) == (
        "no conversation is left; of 3, 1 have fewer tokens than --min_length 25, "
        "2 have more tokens than --max_length 27. Change these options or give other conversations."
    )


# -- held out -----------------------------------------------------------------------------------


def conversations(rows: list[Row]) -> set[tuple[int, ...]]:
    return {tuple(row.ids[piece].tolist()) for row in rows for piece in pieces_of(row)}


def test_held_out_conversations_are_never_trained_on(tmp_path: Path, request_of: Request) -> None:
    records = mixed_records(300)
    one = write_records(tmp_path / "one.jsonl", records)
    # The same again, in another shape and order.
    same = [{"conversations": record["messages"]} for record in records[::-1]]
    two = write_records(tmp_path / "two.jsonl", same)
    data = chat_data(request_of(one, two, eval_ratio=0.1, max_length=256))
    held_out = data.held_out
    assert held_out.sources == ["one", "two"]
    rows = {name: list(held_out.rows(name)) for name in held_out.sources}
    apart = {name: conversations(found) for name, found in rows.items()}
    assert apart["one"] == apart["two"] and 15 <= len(apart["one"]) <= 45
    trained = conversations(rows_of(data))
    assert not trained & apart["one"]
    assert len(trained | apart["one"]) == 300
    assert all((row.labels != IGNORED).any() for row in rows["one"])
    # In an order that the files have no say in: the first rows are a fair part however they are
    # sorted.
    first = [tuple(row.ids[piece].tolist()) for row in rows["one"] for piece in pieces_of(row)]
    last = [tuple(row.ids[piece].tolist()) for row in rows["two"] for piece in pieces_of(row)]
    assert first == last
    assert max(len(pieces_of(row)) for row in rows["one"]) > 1
    padded = chat_data(request_of(one, two, eval_ratio=0.1, max_length=256, packing=False))
    assert len(list(padded.held_out.rows("one"))) == len(apart["one"])


def test_all_answers_to_one_prompt_are_on_one_side(tmp_path: Path, request_of: Request) -> None:
    records = [
        chat(f"{words(3, n)}{' ' * answer}", words(2, n + answer))
        for answer in range(5)
        for n in range(40)
    ]
    records += [chat(words(3, n), words(1, 150 + n), "w1", "w2") for n in range(40)]
    path = write_records(tmp_path / "chats.jsonl", records)
    data = chat_data(request_of(path, eval_ratio=0.3))

    def prompts(found: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
        return {ids[2:5] for ids in found}

    held_out = conversations([row for name in ["chats"] for row in data.held_out.rows(name)])
    trained = conversations(rows_of(data))
    assert len(held_out | trained) == 240 and 3 <= len(prompts(held_out)) <= 25
    assert not prompts(held_out) & prompts(trained)
    assert len(prompts(held_out) | prompts(trained)) == 40


def test_one_prompt_alone_is_not_held_out(tmp_path: Path, request_of: Request) -> None:
    path = write_records(tmp_path / "chats.jsonl", [chat("w1", words(1, n)) for n in range(9)])
    data = chat_data(request_of(path, eval_ratio=0.5))
    assert data.held_out is None and data.lines[0].startswith("9 conversations")


def test_held_out_rows_are_in_no_order_of_the_file(tmp_path: Path, request_of: Request) -> None:
    """--eval_steps measures the first batches: of a file sorted by length they would be short."""
    path = write_records(tmp_path / "chats.jsonl", [sized(n, first=n) for n in range(8, 64)])
    held = write_records(tmp_path / "held.jsonl", [sized(n) for n in range(8, 64)])
    data = chat_data(request_of(path, eval_data=[held], packing=False))
    lengths = [sum(row.tokens.values()) for row in data.held_out.rows("held")]
    assert sorted(lengths) == list(range(8, 64))
    assert 25 < np.mean(lengths[:20]) < 45 and 25 < np.mean(lengths[-20:]) < 45


def test_eval_data_takes_no_number_and_no_weight(tmp_path: Path, request_of: Request) -> None:
    path = write_records(tmp_path / "chats.jsonl", [sized(20)])
    for word in (f"{path}[5]", f"{path}:0.5"):
        with pytest.raises(UserError, match=r"--eval_data .*: takes no \[N\] and no :weight"):
            chat_data(request_of(path, eval_data=[word]))


def test_overlong_conversations_of_eval_data_are_dropped_too(
    tmp_path: Path, request_of: Request
) -> None:
    path = write_records(tmp_path / "chats.jsonl", [sized(20)])
    held = write_records(tmp_path / "held.jsonl", [sized(90, answer=40), sized(30)])
    for overlong, number in (("cut", 2), ("drop", 1)):
        data = chat_data(request_of(path, eval_data=[held], overlong=overlong))
        assert data.held_out.num_conversations == number
    assert (
        "--eval_data: dropped 1 of 2 conversations: more tokens than --max_length 64 "
        f"(first: {held} line 1)" in data.lines
    )


def test_blanks_do_not_make_another_conversation(tmp_path: Path, request_of: Request) -> None:
    path = write_records(tmp_path / "chats.jsonl", [chat("w1", "w2"), chat("w1", "w3")])
    held = write_records(tmp_path / "held.jsonl", [chat("w1 ", " w2\n")])
    data = chat_data(request_of(path, eval_data=[held]))
    assert "dropped 1 of 2 conversations: in --eval_data too" in data.lines


def test_a_small_share_of_few_conversations_holds_out_one(
    tmp_path: Path, request_of: Request
) -> None:
    path = write_records(tmp_path / "chats.jsonl", [sized(20, first=n) for n in range(10)])
    for ratio, held_out in ((0.0001, 1), (0.9999, 9)):
        data = chat_data(request_of(path, eval_ratio=ratio))
        assert data.held_out.num_conversations == held_out
        assert len(conversations(rows_of(data))) == 10 - held_out
    assert chat_data(request_of(path)).held_out is None


def test_conversations_of_eval_data_are_left_out_of_training(
    tmp_path: Path, request_of: Request
) -> None:
    records = [sized(20, first=n) for n in range(10)]
    path = write_records(tmp_path / "chats.jsonl", records)
    held_out = write_records(tmp_path / "held.jsonl", [*records[3:5], sized(70), sized(31)])
    data = chat_data(request_of(path, eval_data=[held_out], eval_ratio=0.5))
    assert "dropped 2 of 10 conversations: in --eval_data too" in data.lines
    assert (
        "--eval_data: dropped 1 of 4 conversations: no trained token left within --max_length 64 "
        f"(first: {held_out} line 3)" in data.lines
    )
    assert data.held_out.num_conversations == 3 and data.held_out.sources == ["held"]
    assert len(conversations(rows_of(data))) == 8
    long = write_records(tmp_path / "long.jsonl", [sized(70)])
    with pytest.raises(UserError, match="--eval_data: no conversation is left"):
        chat_data(request_of(path, eval_data=[long]))


# -- identity -----------------------------------------------------------------------------------


def test_identity_changes_with_the_rows_and_with_nothing_else(
    tmp_path: Path, request_of: Request
) -> None:
    records = mixed_records(30)
    path = write_records(tmp_path / "chats.jsonl", records)
    first = chat_data(request_of(path)).identity
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    copy = shutil.copy(path, moved / "chats.jsonl")
    assert chat_data(request_of(str(copy), cache_dir=tmp_path / "second")).identity == first
    assert chat_data(request_of(path, skip_bad_lines=True)).identity == first
    changed = [
        chat_data(request_of(path, **change)).identity
        for change in (
            {"max_length": 32},
            {"min_length": 20},
            {"overlong": "drop", "max_length": 32},
            {"loss_role": "user"},
            {"loss_role": "all"},
            {"other_role_weight": 0.1},
            {"eval_ratio": 0.1},
        )
    ]
    changed.append(chat_data(request_of(f"{path}[5]")).identity)
    changed.append(chat_data(request_of(f"{path}[5]", seed=1)).identity)
    write_records(tmp_path / "chats.jsonl", [*records[:-1], records[0]])
    changed.append(chat_data(request_of(path)).identity)
    assert len({first, *changed}) == 1 + len(changed)


@pytest.mark.parametrize("template", [*TEMPLATES])
def test_identity_survives_the_export_of_the_tokenizer(
    tmp_path: Path, request_of: Request, template: str
) -> None:
    """A resumed run takes the tokenizer of its checkpoint, with the template in it."""
    texts = [f"What is {n}? It is the number {n * 7}, as you know. " * 3 for n in range(200)]
    base = tmp_path / "base"
    save_tokenizer(train_tokenizer(texts, 300), base)
    prompts = [{"prompt": f"What is {n}?\n", "completion": f"It is {n * 7}."} for n in range(20)]
    path = write_records(tmp_path / "data.jsonl", prompts)

    tokenizer = load_tokenizer(str(base), tmp_path)
    use_template(tokenizer, template, ())
    save_tokenizer(tokenizer, tmp_path / "first")
    first = chat_data(request_of(path, tokenizer=str(tmp_path / "first")))
    # The base tokenizer again: the run itself started anew.
    again = load_tokenizer(str(base), tmp_path)
    use_template(again, template, ())
    assert ChatTemplate(again).identity == ChatTemplate(tokenizer).identity
    # The checkpoint's, of which a checkpoint is made in turn.
    for number, choice in enumerate((None, template, "tokenizer")):
        source = tmp_path / ("first" if number == 0 else f"export-{number - 1}")
        exported = load_tokenizer(str(source), tmp_path)
        assert use_template(exported, choice, ()).added_tokens == []
        assert ChatTemplate(exported).identity == ChatTemplate(tokenizer).identity
        exported.save_pretrained(tmp_path / f"export-{number}")
        resumed = chat_data(request_of(path, tokenizer=str(tmp_path / f"export-{number}")))
        assert resumed.tokenizer_hash == first.tokenizer_hash
        assert resumed.identity == first.identity
    assert len(list((tmp_path / "cache" / "conversations").iterdir())) == 1, "encoded twice"


# -- bad records and kinds ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_records_are_named_by_file_and_line(
    tmp_path: Path, request_of: Request, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("llama_lib.data.chat.encode._WORKER_BYTES", 1)
    monkeypatch.setattr("llama_lib.data.chat.encode._PART_BYTES", 120)
    save_tokenizer(word_tokenizer("plain"), tmp_path / "plain")
    good = chat("w1 ", "w2")
    # The template refuses line 3 when it is encoded; line 5 is wrong when it is read.
    records = [good, good, chat("w1 ", "w2", "w3 ", "w4"), good, {"messages": 3}, good]
    path = write_records(tmp_path / "chats.jsonl", records)
    request = request_of(path, tokenizer=str(tmp_path / "plain"), workers=workers)
    with pytest.raises(UserError) as caught:
        chat_data(request)
    assert re.match(rf"{re.escape(path)} line 3: .*--skip_bad_lines", str(caught.value))
    if workers == 1:
        write_records(tmp_path / "chats.jsonl", records[3:])
        with pytest.raises(UserError, match=r"chats.jsonl line 2: .*--skip_bad_lines"):
            chat_data(request)
        write_records(tmp_path / "chats.jsonl", records)
        skipped = chat_data(request_of(path, tokenizer=request.tokenizer, skip_bad_lines=True))
        assert skipped.lines[0].startswith("4 conversations")
        assert [line.split(": ")[0] for line in skipped.lines[1:3]] == [
            "left out 1 bad record(s) (first"
        ] * 2


def test_a_file_of_bad_records_alone_is_refused(tmp_path: Path, request_of: Request) -> None:
    save_tokenizer(word_tokenizer("plain"), tmp_path / "plain")
    good = write_records(tmp_path / "good.jsonl", [chat("w1 ", "w2")])
    bad = write_records(tmp_path / "bad.jsonl", [chat("w1 ", "w2", "w3 ", "w4")] * 2)
    request = request_of(good, bad, tokenizer=str(tmp_path / "plain"), skip_bad_lines=True)
    with pytest.raises(UserError, match=r"bad.jsonl: all 2 records are bad"):
        chat_data(request)


def test_kinds_of_the_data(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_records(folder / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    (folder / "b.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    assert kinds_of([str(folder)], None, tmp_path / "cache") == {"completion", "text"}
    chats = write_records(tmp_path / "c.jsonl", [chat("a", "b")])
    kinds = kinds_of([f"{folder}[3]:0.5", f"{chats}:0.5"], None, tmp_path / "cache")
    assert kinds == {"completion", "text", "conversation"}
    with pytest.raises(UserError, match="no such file"):
        kinds_of([str(tmp_path / "none.jsonl")], None, tmp_path / "cache")


def test_kinds_are_those_of_every_file_of_a_source(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_records(folder / "train-00000-of-00002.jsonl", [{"text": "one"}])
    write_records(folder / "train-00001-of-00002.jsonl", [chat("a", "b")])
    assert kinds_of([str(folder)], None, tmp_path / "cache") == {"text", "conversation"}


def test_a_file_of_no_known_shape_is_refused_by_its_first_records(tmp_path: Path) -> None:
    wrong = [{"question": "a", "answer": "b"}]
    path = write_records(tmp_path / "chats.jsonl", [*wrong * 8, chat("a", "b")])
    # What is behind them is not looked at: it might be many gigabytes.
    with pytest.raises(UserError, match=r"chats.jsonl has no .*found answer, question"):
        kinds_of([path], None, tmp_path / "cache")
    write_records(tmp_path / "chats.jsonl", [*wrong * 7, chat("a", "b")])
    assert kinds_of([path], None, tmp_path / "cache") == {"conversation"}
    empty = [{"messages": []}]
    write_records(tmp_path / "chats.jsonl", [*empty * 99, {"text": "a"}])
    assert kinds_of([path], None, tmp_path / "cache") == {"text"}
    write_records(tmp_path / "chats.jsonl", [*empty * 100, {"text": "a"}])
    with pytest.raises(UserError, match=r"first 100 records are bad; the first one, line 1: .*no "):
        kinds_of([path], None, tmp_path / "cache")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data beside the checkout")
def test_published_conversations_and_prompts(tmp_path: Path, request_of: Request) -> None:
    chats = SHARED / "conversations" / "sharegpt.json"
    prompts = SHARED / "self_instruct" / "train.jsonl"
    data = chat_data(request_of(str(chats), str(prompts), max_length=512))
    kept = int(data.lines[0].split()[0].replace(",", ""))
    assert kept > 3000 and data.lines[-1].startswith(f"packed {kept:,} conversations into ")
    assert sum(len(row) for row in passages_of(data)) == kept
