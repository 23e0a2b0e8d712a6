"""What makes a conversation, and what is said about a list of turns that makes none."""

import pytest

from llama_lib.data.bad_records import BadRecord
from llama_lib.data.chat.messages import ROLES, Example, Message, conversation

ASK, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
RULE = {"role": "system", "content": "Be brief."}


def reason(turns: object, system: str | None = None) -> str:
    with pytest.raises(BadRecord) as caught:
        conversation(turns, system)
    return str(caught.value)


def said_by(example: Example) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in example.messages]


def test_turns_come_as_they_are() -> None:
    spaced = {"role": "user", "content": " \u4f60\u597d \U0001f600\n"}
    example = conversation([RULE, ASK, ANSWER, spaced, ANSWER])
    assert said_by(example) == [
        ("system", "Be brief."),
        ("user", "Why?"),
        ("assistant", "Because."),
        ("user", " \u4f60\u597d \U0001f600\n"),
        ("assistant", "Because."),
    ]
    assert (example.text, example.kind, example.cut_turns) == (None, "conversation", 0)
    assert {message.role for message in example.messages} == set(ROLES)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("prompter", "user"),
        ("developer", "system"),
        ("User", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("bard", "assistant"),
        ("model", "assistant"),
        ("GPT", "assistant"),
    ],
)
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_names_of_roles_in_published_data(name: str, role: str, keys: tuple[str, str]) -> None:
    turn = dict(zip(keys, (name, "x"), strict=True))
    turns = {"system": [turn, ASK, ANSWER], "user": [turn, ANSWER], "assistant": [ASK, turn]}[role]
    assert (role, "x") in said_by(conversation(turns))


def test_what_stands_beside_a_turn_is_ignored() -> None:
    # As a table gives it: every turn has every column.
    turns = [
        {"role": None, "content": None, "from": "human", "value": "a", "weight": None},
        {"role": "assistant", "content": "b", "from": None, "value": None, "weight": 1.0},
    ]
    assert said_by(conversation(turns)) == [("user", "a"), ("assistant", "b")]


def test_text_parts_are_joined_and_other_parts_named() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    example = conversation([{"role": "user", "content": parts}, ANSWER])
    assert said_by(example)[0] == ("user", "a b")
    for part, kind in (({"type": "image_url", "image_url": {}}, "image_url"), ("a", "str")):
        told = reason([{"role": "user", "content": [*parts, part]}, ANSWER])
        assert told == f"turn 1 (user) has a part that is no text: {kind}"
    assert reason([{"role": "user", "content": []}, ANSWER]) == "turn 1 (user) is empty"


def test_a_weight_of_0_is_not_trained_on() -> None:
    turns = [ASK, {**ANSWER, "weight": 0}, {**ASK, "weight": None}, {**ANSWER, "weight": 1}]
    assert [turn.trained for turn in conversation(turns).messages] == [True, False, True, True]
    # A table has the column in every turn, as numbers of any kind.
    turns = [{**ASK, "weight": 0.0}, {**ANSWER, "weight": 1.0, "tool_calls": []}]
    assert [turn.trained for turn in conversation(turns).messages] == [False, True]


def test_an_end_mark_behind_an_answer_is_taken_off() -> None:
    marked = {"role": "assistant", "content": "Because. <|endoftext|>\n"}
    asked = {"role": "user", "content": "Why?<|endoftext|>"}
    found = said_by(conversation([asked, marked, ASK, ANSWER]))
    assert [content for _, content in found[:3]] == ["Why?<|endoftext|>", "Because. ", "Why?"]
    nothing = {"role": "assistant", "content": "<|endoftext|>"}
    assert reason([ASK, nothing]) == "turn 2 (assistant) is empty"


def test_a_dict_of_lists_is_a_list_of_turns() -> None:
    """As Hugging Face's Sequence of dicts is kept."""
    turns = {"from": ["human", "gpt"], "value": ["a", "b"], "weight": None}
    assert said_by(conversation(turns)) == [("user", "a"), ("assistant", "b")]


def test_answers_that_are_given_are_not_trained_on() -> None:
    example = conversation([ASK, ANSWER, ASK, ANSWER], "Be kind.", given=3)
    assert [turn.trained for turn in example.messages] == [True, True, False, True, True]


def test_a_system_column_speaks_first_and_once() -> None:
    example = conversation([ASK, ANSWER], "Be kind.")
    assert example.messages[0] == Message("system", "Be kind.")
    assert example.cut_turns == 0
    assert "beside the column `system`" in reason([RULE, ASK, ANSWER], "Be kind.")
    # Turns are counted as they stand in the record.
    assert reason([ASK, ASK, ANSWER], "Be kind.").startswith("turn 2: user after user")


@pytest.mark.parametrize(("unanswered", "system"), [(1, None), (2, None), (1, "Be kind.")])
def test_unanswered_turns_at_the_end_are_cut_and_counted(
    unanswered: int, system: str | None
) -> None:
    example = conversation([ASK, ANSWER] + [ASK] * unanswered, system)
    assert example.messages[-1].role == "assistant"
    assert len(example.messages) == 2 + (system is not None)
    assert example.cut_turns == unanswered


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([ASK, ASK, ANSWER], "turn 2: user after user; user and assistant must take turns"),
        ([ASK, ANSWER, ANSWER], "turn 3: assistant after assistant"),
        ([RULE, ASK, ANSWER, ASK, ASK, ANSWER], "turn 5: user after user"),
        ([ANSWER, ASK, ANSWER], "turn 1: the assistant speaks first, expected the user"),
        ([RULE, ANSWER], "turn 2: the assistant speaks first"),
        ([ASK, RULE, ANSWER], "turn 2: a system turn can only be the first"),
        ([RULE, RULE, ASK, ANSWER], "turn 2: a system turn can only be the first"),
        ([ASK, ANSWER, RULE], "turn 3: a system turn can only be the first"),
        ([ASK, {"role": "assistant", "content": " \n"}], "turn 2 (assistant) is empty"),
        ([ASK, ANSWER, {"role": "user", "content": ""}], "turn 3 (user) is empty"),
        ([{"role": "system", "content": ""}, ASK, ANSWER], "turn 1 (system) is empty"),
        ([ASK, {"role": "assistant", "content": None}], "turn 2 (assistant) is null, not a string"),
        ([ASK, {"role": "assistant", "content": 7}], "turn 2 (assistant) is int, not a string"),
        ([ASK, {"role": "tool", "content": "x"}, ANSWER], "turn 2: unknown role 'tool'"),
        ([{"role": 1, "content": "x"}, ANSWER], "turn 1: unknown role 1; expected system (d"),
        ([ASK, {"content": "x", "name": "n"}], "turn 2 has no `role` (or `from`); found content, "),
        ([ASK, {}], "turn 2 has no `role` (or `from`); found nothing"),
        (
            [{"role": "user", "text": "Why?"}, ANSWER],
            "turn 1 (user) has no `content` (or `value`); found role, text",
        ),
        ([ASK, {**ANSWER, "weight": 0.5}], "turn 2 (assistant) has the weight 0.5, expected 0 ("),
        ([ASK, {**ANSWER, "weight": "1"}], "turn 2 (assistant) has the weight '1', expected 0 ("),
        (
            [ASK, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
            "turn 2 (assistant) has `tool_calls`: calls of tools cannot be trained on",
        ),
        ([ASK, {**ANSWER, "function_call": {"name": "f"}}], "turn 2 (assistant) has `function_cal"),
        ([{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}], "turn 2: unknown role"),
        ({"role": ["user", "gpt"], "content": ["a"]}, "the lists of the conversation differ in le"),
        ({"role": [], "content": []}, "the conversation has no turns"),
        ([ASK, "Because."], "turn 2 is str, expected an object"),
        ([ASK], "the conversation has no turn of an assistant"),
        ([RULE], "the conversation has no turn of an assistant"),
        ([RULE, ASK], "the conversation has no turn of an assistant"),
        ([], "the conversation has no turns"),
        (None, "the conversation is null, expected a list of turns"),
        ({"role": "user"}, "the conversation is dict, expected a list of turns"),
        ([{"role": "user", "content": "ab\ud800"}, ANSWER], "turn 1 (user): half a surrogate pair"),
    ],
)
def test_what_is_wrong_is_told_by_turn(turns: object, told: str) -> None:
    assert reason(turns).startswith(told)
