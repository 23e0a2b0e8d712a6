"""What a user of finetune.py can get wrong ends at once: exit code 2 and one message."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import finetune
from llama_lib.data.chat.templates import TEMPLATES
from llama_lib.data.tokenizer import save_tokenizer, train_tokenizer
from tests.refused import Attempt, Command, attempt_of, command_of, everything_in, missing_from

CHAT = [{"role": "user", "content": "say cat"}, {"role": "assistant", "content": "the cat"}]
GOOD = json.dumps({"messages": CHAT})


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a right run needs: `model`, a Hugging Face folder, and chats.jsonl."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["say the cat sat on the mat"] * 50, 280)
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    save_tokenizer(tokenizer, folder / "tokenizer")
    tokenizer.save_pretrained(folder / "model")
    (folder / "chats.jsonl").write_text((GOOD + "\n") * 20)
    return folder


@pytest.fixture
def command(
    tmp_path: Path,
    base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Command:
    """finetune.py, with right values for what is left out."""
    monkeypatch.chdir(tmp_path)
    right = {
        "--model_path": f"{base / 'model'}",
        "-l": "48",
        "-d": f"{base / 'chats.jsonl'}",
        "--cache_dir": "cache",
        "--workers": "1",
    }
    return command_of(finetune.main, right, capsys, monkeypatch)


@pytest.fixture
def attempt(command: Command, tmp_path: Path) -> Attempt:
    """The message of a command that has to be refused."""
    return attempt_of(command, tmp_path)


def test_without_a_mistake_the_same_command_is_accepted(command, tmp_path):
    ended = command("--check")
    assert (ended.code, everything_in(tmp_path)) == (0, []), ended.err
    assert missing_from(ended.out, "chat template chatml", "packed", "tokens per step") == []


# -- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--model_path", ""], ["--model_path", "--load"]),
        (["--model_path", "./nowhere"], ["--model_path ./nowhere", "no such folder"]),
        (["--model_path", "", "--load", "auto"], ["no checkpoint", "--model_path"]),
        (["--model_path", "unfinished"], ["unfinished", "did not finish"]),
        (["--model_path", "empty"], ["empty", "no model here"]),
        (["-l", "65"], ["--max_length 65", "context of 64"]),
        (["-c", "tiny"], ["-c"]),
        (["--packing", "best_fit"], ["--packing"]),
        (["--streaming"], ["--streaming"]),
    ],
)
def test_models_and_options_of_pretraining(attempt, tmp_path, argv, parts):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "model").mkdir(parents=True)
    (tmp_path / "unfinished" / "model" / "config.json").write_text("{}")
    assert missing_from(attempt(*argv), *parts) == []


def test_a_tokenizer_with_more_ids_than_the_model(attempt, tmp_path):
    save_tokenizer(train_tokenizer(["the cat sat on a mat " * 9] * 9, 300), tmp_path / "large")
    enlarged = train_tokenizer(["abc"], 259)
    enlarged.add_tokens([f"word{number}" for number in range(50)])
    save_tokenizer(enlarged, tmp_path / "large")
    message = attempt("--tokenizer", "large")
    assert missing_from(message, "309 ids", "vocab_size is 280") == []


# -- conversations ------------------------------------------------------------------------------


def turns(*pairs: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in pairs]})


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["is empty"]),
        ('{"body": "x"}', ["found body", "completion", "messages", "instruction"]),
        (f"{GOOD}\n{GOOD}\n{{broken", ["chats.jsonl line 3", "--skip_bad_lines"]),
        (
            f"{GOOD}\n" + turns(("user", "a"), ("user", "b"), ("assistant", "c")),
            ["line 2", "turn 2", "user"],
        ),
        (f"{GOOD}\n" + turns(("assistant", "a"), ("user", "b")), ["line 2", "turn 1"]),
        (turns(("user", "a"), ("assistant", "b"), ("system", "c")), ["line 1", "turn 3"]),
        (f"{GOOD}\n" + turns(("user", "a"), ("tool", "b")), ["line 2", "turn 2", "tool"]),
        (f"{GOOD}\n" + turns(("user", " \n"), ("assistant", "b")), ["line 2", "turn 1", "empty"]),
        (f"{GOOD}\n" + turns(("user", "a"), ("assistant", "")), ["line 2", "turn 2", "empty"]),
        (f"{GOOD}\n" + turns(("user", "a")), ["line 2", "assistant"]),
        (f"{GOOD}\n" + turns(("user", 7), ("assistant", "b")), ["line 2", "turn 1", "int"]),
        (f"{GOOD}\n" + '{"messages": []}', ["line 2"]),
        (f"{GOOD}\n" + '{"messages": "hello"}', ["line 2", "str"]),
        (f"{GOOD}\n" + '{"prompt": "a", "completion": null}', ["line 2", "completion"]),
        (f"{GOOD}\n" + '{"instruction": "", "output": "b"}', ["line 2"]),
    ],
)
def test_bad_conversations(attempt, tmp_path, content, parts):
    (tmp_path / "chats.jsonl").write_text(content)
    assert missing_from(attempt("-d", "chats.jsonl"), "chats.jsonl", *parts) == []


def test_bad_lines_are_counted_when_asked(command, tmp_path):
    bad = turns(("user", "a"), ("user", "b"), ("assistant", "c"))
    (tmp_path / "chats.jsonl").write_text((GOOD + "\n") * 8 + bad + "\n")
    ended = command("-d", "chats.jsonl", "--skip_bad_lines", "--check")
    assert ended.code == 0, ended.err
    assert missing_from(ended.out, "1 bad", "line 9", "turn 2") == []


def test_prepared_tokens_are_no_conversations(attempt, tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "manifest.json").write_text("{}")
    assert missing_from(attempt("-d", "tokens"), "tokens", "prepared dataset") == []


def test_nothing_left_to_train_on(attempt, tmp_path):
    long = turns(("user", "the cat " * 60), ("assistant", "b"))
    (tmp_path / "chats.jsonl").write_text((long + "\n") * 4)
    message = attempt("-d", "chats.jsonl")
    assert missing_from(message, "4", "--max_length 48") == []


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["-b", "64"], ["less than one global batch of 64"]),
        (["--min_length", "50"], ["--min_length 50", "--max_length 48"]),
        (["--overlong", "split"], ["split", "cut, drop"]),
        (["--loss_role", "bot"], ["bot", "assistant, user, all"]),
        (["--other_role_weight", "2"], ["--other_role_weight", "from 0 to 1"]),
        (["-d", "chats.jsonl[0]"], ["chats.jsonl[0]", "whole number from 1"]),
        (["-d", "missing.jsonl"], ["missing.jsonl", "no such file"]),
        (["--eval_data", "x.jsonl[5]"], ["--eval_data x.jsonl[5]", "takes no [N]"]),
        (["--sample_interval", "5"], ["--sample_interval", "--sample_prompts"]),
        (["--sample_prompts", "missing.txt"], ["missing.txt"]),
    ],
)
def test_settings(attempt, argv, parts):
    assert missing_from(attempt(*argv), *parts) == []


# -- templates ----------------------------------------------------------------------------------

NO_END = "{% for m in messages %}{{ m.content }} {% endfor %}"
FORGETS = (
    "{% for m in messages %}<s>{{ m.role }}: "
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content[:1] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("tokenizer", ["--chat_template tokenizer", "no chat template"]),
        ("llama-4", ["llama-4", *TEMPLATES]),
        ("missing.jinja", ["missing.jinja"]),
        ("broken.jinja", ["broken.jinja"]),
        ("no_end.jinja", ["no special token", "would not learn to stop"]),
    ],
)
def test_templates(attempt, tmp_path, template, parts):
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}{{ m.content }")
    (tmp_path / "no_end.jinja").write_text(NO_END)
    assert missing_from(attempt("--chat_template", template), *parts) == []


def test_a_template_that_rewrites_what_was_said(attempt, tmp_path):
    (tmp_path / "forgets.jinja").write_text(FORGETS)
    two = turns(*[("user", "say cat"), ("assistant", "the cat")] * 2)
    (tmp_path / "chats.jsonl").write_text((two + "\n") * 20)
    message = attempt("-d", "chats.jsonl", "--chat_template", "forgets.jinja")
    assert missing_from(message, "template") == []


def test_plain_has_no_turns(attempt, tmp_path):
    two = turns(*[("user", "say cat"), ("assistant", "the cat")] * 2)
    (tmp_path / "chats.jsonl").write_text((GOOD + "\n") + (two + "\n") * 20)
    message = attempt("-d", "chats.jsonl", "--chat_template", "plain")
    assert missing_from(message, "chats.jsonl line 2", "plain") == []


# -- layouts and adapters -----------------------------------------------------------------------

HYBRID = ["-p", "hybrid_parallel"]
LORA = ["--lora_rank", "4", "--chat_template", "llama-2"]


@pytest.mark.parametrize(
    ("argv", "processes", "parts"),
    [
        ([*HYBRID, "--sp", "2", "--sp_mode", "all_to_all"], 2, ["sequence", "--no_packing"]),
        ([*LORA, "-p", "gemini"], 1, ["--lora_rank", "gemini", "zero2"]),
        ([*LORA, "-p", "gemini_auto"], 1, ["--lora_rank", "gemini_auto"]),
        ([*LORA, *HYBRID, "--tp", "2"], 2, ["--lora_rank", "--tp 2"]),
        ([*LORA, *HYBRID, "--pp", "2"], 2, ["--lora_rank", "--pp 2"]),
        ([*LORA, "-p", "zero2", "--lora_targets", "wq"], 1, ["wq", "q_proj", "down_proj"]),
        (["--merge_lora"], 1, ["--merge_lora", "--lora_rank"]),
        (["--lora_rank", "4", "-p", "zero2"], 1, ["--lora_rank", "adds 2 token(s)", "llama-2"]),
    ],
)
def test_layouts_and_adapters(attempt, argv, processes, parts):
    assert missing_from(attempt(*argv, processes=processes), *parts) == []


def test_packing_where_a_model_drops_attention_out(attempt, base, tmp_path):
    config = json.loads((base / "model" / "config.json").read_text())
    for path in (base / "model").iterdir():
        (tmp_path / "dropping").mkdir(exist_ok=True)
        (tmp_path / "dropping" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "dropping" / "config.json").write_text(
        json.dumps({**config, "attention_dropout": 0.1})
    )
    message = attempt("--model_path", "dropping")
    assert missing_from(message, "attention_dropout", "--no_packing") == []


def test_all_mistakes_are_shown_together(attempt, tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "manifest.json").write_text("{}")
    data = ["-d", "missing.jsonl", "tokens"]
    message = attempt("-l", "65", *data, *LORA, "-p", "gemini")
    parts = ["--max_length 65", "missing.jsonl", "tokens is a prepared dataset", "--lora_rank"]
    assert missing_from(message, *parts) == []


def test_a_dry_run_says_what_the_run_would_refuse(command, tmp_path):
    """It passed, and the run was refused: --save_dir is by default that of pretraining."""
    saved = tmp_path / "checkpoint" / "step-00000001"
    saved.mkdir(parents=True)
    state = {"options": {"data": {"packing": "concat", "streaming": False}}}
    (saved / "trainer_state.json").write_text(json.dumps(state))
    ended = command("--check")
    assert ended.code == 0, ended.err
    words = "--save_dir checkpoint holds checkpoints of pretrain.py; choose another one"
    assert f"without --check this is refused: {words}" in ended.out
    refused = command()
    assert refused.code == 2 and words in refused.err


def test_warm_up_is_a_part_of_the_run(command):
    ended = command("--check", "-e", "20")  # 20 rows, two a step
    assert "200 steps" in ended.out and "--warmup_steps is 6: 3% of the steps" in ended.out
    assert "warm-up 6 steps = 3% of the run" in ended.out
    typed = command("--check", "-e", "20", "-s", "9")
    assert "warm-up 9 steps" in typed.out and "--warmup_steps is" not in typed.out


def test_a_prompt_longer_than_a_row(attempt):
    message = attempt("--sample_prompts", "the cat " * 50)
    assert missing_from(message, "--sample_prompts", "tokens", "--max_length 48") == []


def test_few_held_out_conversations_are_pointed_out(command, tmp_path):
    chats = [turns(("user", f"say {i}"), ("assistant", "cat")) for i in range(30)]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    few = command("-d", "chats.jsonl", "--check", "--eval_ratio", "0.01")
    assert few.code == 0 and "conversation(s) are held out: their loss says" in few.out
    many = command("-d", "chats.jsonl", "--check", "--eval_ratio", "0.8")
    assert many.code == 0 and "conversation(s) are held out" not in many.out


def test_settings_of_adapters_without_adapters(command):
    ended = command("--lora_alpha", "64", "--lora_targets", "q_proj", "--check")
    parts = ["--lora_alpha is ignored without --lora_rank", "--lora_targets is ignored"]
    assert ended.code == 0 and missing_from(ended.out, *parts) == []


def test_a_setting_without_effect_is_said(command):
    ended = command(
        "--task_name", "x", "--loss_role", "all", "--other_role_weight", "0.5", "--check"
    )
    assert ended.code == 0, ended.err
    parts = ["--task_name is ignored", "--other_role_weight is ignored"]
    assert missing_from(ended.out, *parts) == []
