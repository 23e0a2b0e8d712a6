"""`inspect --labels`: what is marked is what is trained on, and nothing else is changed."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_lib.data.chat.show import BRACKETS, COLOURS, marked_text
from llama_lib.data.inspect import main
from llama_lib.data.tokenizer import load_tokenizer
from llama_lib.errors import UserError

SYSTEM = {"role": "system", "content": "be brief"}
CHAT = [
    SYSTEM,
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "sat on\nthe mat"},
    {"role": "user", "content": "and so?"},
    {"role": "assistant", "content": " did \u6f22 "},
]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    records: list[dict[str, Any]] = [
        {"messages": CHAT},
        {"prompt": "a prompt", "completion": " the answer"},
        {"text": "a text of nobody"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def show(tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def shown(data: Path | str, *words: str) -> str:
        flags = ["--labels", "--tokenizer", str(tokenizer_path), "--cache_dir", str(tmp_path / "c")]
        assert main([str(data), *flags, *words]) == 0
        return capsys.readouterr().out

    return shown


def conversation(output: str) -> str:
    """The text of the first conversation."""
    return output.split("\n\n")[1].partition("\n")[2]


def table(output: str) -> dict[str, tuple[int, int, float]]:
    rows = re.findall(r"^(\w+) +([\d,]+) +([\d,]+) +([\d,.]+)$", output, re.M)
    return {name: (int(tokens), int(labels), float(sum)) for name, tokens, labels, sum in rows}


CHATML = """<|im_start|>system
{0}be brief<|im_end|>{1}
<|im_start|>user
{0}the cat?<|im_end|>{1}
<|im_start|>assistant
[[sat on
the mat<|im_end|>]]
<|im_start|>user
{0}and so?<|im_end|>{1}
<|im_start|>assistant
[[ did \u6f22 <|im_end|>]]"""


def test_answers_and_their_ends_are_marked(chats, show):
    output = show(chats, "--chat_template", "chatml")
    assert conversation(output).strip() == CHATML.format("", "")
    assert "answers end with <|im_end|>, </s>" in output
    roles = table(output)
    assert roles["assistant"][0] == roles["assistant"][1] == roles["assistant"][2]
    assert roles["user"][1] == roles["system"][1] == roles["template"][1] == 0
    assert roles["all"][0] == sum(row[0] for name, row in roles.items() if name != "all")
    headline = f"{chats} line 1: {roles['all'][0]} tokens, {roles['all'][1]} trained on"
    assert headline in output.splitlines()


def test_the_template_is_chosen_as_in_training(chats, show):
    assert "chat template chatml" in show(chats)
    chats.write_text('{"prompt": "a prompt", "completion": " the answer"}\n')
    output = show(chats)
    assert "chat template plain" in output
    assert conversation(output) == "a prompt\n[[ the answer</s>]]"


def test_other_roles_that_count_less_have_marks_of_their_own(chats, show):
    output = show(chats, "--chat_template", "chatml", "--other_role_weight", "0.25")
    assert conversation(output).strip() == CHATML.format("((", "))")
    tokens, labels, weight = table(output)["user"]
    assert tokens == labels and weight == pytest.approx(tokens / 4, abs=0.05)
    assert "counting 0.25: ((these))" in output


def test_loss_role_user_and_all(chats, show):
    as_user = conversation(show(chats, "--chat_template", "chatml", "--loss_role", "user"))
    assert "[[the cat?<|im_end|>]]" in as_user and "[[sat" not in as_user
    everything = conversation(show(chats, "--chat_template", "chatml", "--loss_role", "all"))
    # nothing predicts the first token
    assert everything.startswith("<|im_start|>[[system\n") and everything.count("[[") == 1


def test_a_conversation_is_cut_as_rows_are(chats, show):
    whole = table(show(chats, "--chat_template", "chatml"))["all"][0]
    output = show(chats, "--chat_template", "chatml", "-l", str(whole - 3))
    assert f"{whole - 3} tokens" in output and f"cut from {whole} tokens" in output
    assert conversation(output).strip().count("<|im_end|>") == 4
    output = show(chats, "-l", "5")
    assert f"0 trained on, cut from {whole} tokens; finetune.py leaves it out" in output


def test_a_conversation_is_cut_as_by_finetune_without_a_length(
    chats, show, tokenizer_path, tmp_path
):
    text = "the cat " * 4000
    chats.write_text(json.dumps({"prompt": "a", "completion": text}) + "\n")
    assert re.search(r"line 1: 4,096 tokens, .*, cut from [\d,]+ tokens", show(chats))
    # Of a model, never more than its context.
    model = shutil.copytree(tokenizer_path, tmp_path / "model")
    (model / "config.json").write_text('{"max_position_embeddings": 512}')
    assert "line 1: 512 tokens, " in show(chats, "--tokenizer", str(model))
    (model / "config.json").write_text('{"max_position_embeddings": 131072}')
    assert "line 1: 4,096 tokens, " in show(chats, "--tokenizer", str(model))


def test_data_is_named_as_for_finetune(chats, show):
    expected = show(chats)
    for word in (f"{chats}[2]", f"{chats}:0.5", f"{chats}[2]:0.5"):
        assert show(word) == expected


def test_answers_of_weight_0_are_not_marked(chats, show):
    turns = [{**turn, "weight": 0} if n == 2 else turn for n, turn in enumerate(CHAT)]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    output = show(chats, "--chat_template", "chatml", "--other_role_weight", "1")
    assert "sat on\nthe mat<|im_end|>" in output and "[[sat on" not in output
    assert "[[ did" in output
    roles = table(output)
    assert roles["untrained"][0] > 0 == roles["untrained"][1]


def test_several_are_named_by_line_or_row(chats, show, tmp_path):
    output = show(chats, "--number", "9")
    assert [f"{chats} line {n}:" in output for n in (1, 2, 3, 4)] == [True, True, True, False]
    # texts are trained on as they are, but for the first token, which nothing predicts
    assert "\na[[ text of nobody</s>]]\n" in output
    table_file = tmp_path / "table.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), table_file)
    assert f"{table_file} row 1:" in show(table_file)


def test_colours_take_the_place_of_brackets(chats, show):
    output = conversation(show(chats, "--chat_template", "chatml", "--colour", "always"))
    begin, end = COLOURS.whole
    assert f"{begin}sat on{end}\n{begin}the mat<|im_end|>{end}\n" in output
    plain = output.replace(begin, "").replace(end, "")
    assert plain.strip() == CHATML.format("", "").replace("[[", "").replace("]]", "")


def test_marks_leave_the_text_as_it_is(tokenizer_path):
    """Also where they fall within a character of several bytes."""
    tokenizer = load_tokenizer(str(tokenizer_path))
    text = "the cat \u6f22\u5b57 sat \U0001f600\U0001f600 on  a\n\n mat"
    ids = np.array(tokenizer(text)["input_ids"], np.int32)
    source = random.Random(0)
    for _ in range(50):
        weights = np.array([source.choice([0, 0.5, 1]) for _ in ids], np.float32)
        marked = marked_text(tokenizer, ids, weights, BRACKETS)
        assert re.sub(r"\[\[|\]\]|\(\(|\)\)", "", marked) == text


def test_data_cannot_command_the_terminal(chats, show):
    chats.write_text(json.dumps({"prompt": "a\u001b[31mb", "completion": "c\u0007\td"}) + "\n")
    assert conversation(show(chats)) == "a\\x1b[31mb\n[[c\\x07\td</s>]]"


def test_a_bad_record_is_named_or_passed_over(chats, show):
    good = json.dumps({"messages": CHAT})
    chats.write_text(json.dumps({"messages": CHAT[:2]}) + f"\n{good}\n")
    with pytest.raises(UserError, match="line 1"):
        show(chats)
    assert "line 2:" in show(chats, "--skip_bad_lines")
    # plain takes one prompt and one answer
    chats.write_text(f'{good}\n{{"prompt": "a", "completion": "b"}}\n')
    with pytest.raises(UserError, match=r"line 1.*--skip_bad_lines"):
        show(chats, "--chat_template", "plain")
    assert "line 2:" in show(chats, "--chat_template", "plain", "--skip_bad_lines")
    chats.write_text(good + "\n")
    with pytest.raises(UserError, match="no conversation"):
        show(chats, "--chat_template", "plain", "--skip_bad_lines")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--labels"], "give --tokenizer FOLDER"),
        (["--labels", "--tokenizer", "x", "--number", "0"], "--number 0"),
        (["--labels", "--tokenizer", "x", "-l", "1"], "-l 1"),
        (["--labels", "--tokenizer", "x", "--other_role_weight", "2"], "expected 0 to 1"),
        (["--labels", "--tokenizer", "x", "--row", "1"], "--row does not"),
        (["--labels", "--tokenizer", "x", "--step", "1"], "--step does not"),
        (["--chat_template", "chatml"], "--chat_template can only be given with --labels"),
    ],
)
def test_wrong_questions_are_refused(chats, words, problem):
    with pytest.raises(UserError, match=problem):
        main([str(chats), *words])
