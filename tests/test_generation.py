"""`generate --chat`: answers against transformers' own generate on the ids of the chat template."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from llama_lib.__main__ import main
from llama_lib.checkpoint.adapters import base_sample
from llama_lib.cli import run_command
from llama_lib.data.tokenizer import save_tokenizer, train_tokenizer
from llama_lib.errors import UserError
from llama_lib.generation import TextStream
from llama_lib.inference import model_folder

CONTEXT = 160
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ONE_TURN = (
    "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"
    "{{ messages[0].content }}"
    "{% if not add_generation_prompt %}{{ messages[1].content }}{% endif %}"
)
TEXT = "the cat sat on the mat, the dog lay beside it and the bird sang to them all"
GREEDY = ["--temperature", "0", "--max_new_tokens", "12"]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with large weights, so that its choices are clear ones; no chat template."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([TEXT] * 3, 280)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    save_tokenizer(tokenizer, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def chat_model(base: Path, folder: Path, template: str = TEMPLATE, **generation: Any) -> Path:
    """`base` with a chat template and settings of generation."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    save_tokenizer(tokenizer, folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.update(**generation)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(base_dir, tmp_path_factory.mktemp("chat") / "model")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def answer_by_transformers(folder: Path, messages: list[dict[str, str]], tokens: int = 12) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def ask(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> tuple[str, str]:
    """(standard output, standard error) of a question."""
    assert main(["generate", str(folder), "--chat", *words]) == 0
    shown = capsys.readouterr()
    return shown.out, shown.err


def type_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.mark.parametrize("system", [None, "be brief"])
def test_one_question_is_answered_as_transformers_does(chat_dir, capsys, system):
    words = [] if system is None else ["--system", system]
    out, err = ask(capsys, chat_dir, "--prompt", "the cat?", *words, *GREEDY)
    messages = ([] if system is None else [turn("system", system)]) + [turn("user", "the cat?")]
    expected = answer_by_transformers(chat_dir, messages)
    assert out == expected + "\n" and expected
    assert err == "(cut after --max_new_tokens 12)\n"


def test_a_piped_conversation_keeps_its_history(chat_dir, capsys, monkeypatch):
    type_in(monkeypatch, "the cat?\n\n  the dog?  \n/new\nthe dog?\n/exit\nnever asked\n")
    out, _ = ask(capsys, chat_dir, "--system", "be kind", *GREEDY)
    system, cat, dog = turn("system", "be kind"), turn("user", "the cat?"), turn("user", "the dog?")
    first = answer_by_transformers(chat_dir, [system, cat])
    second = answer_by_transformers(chat_dir, [system, cat, turn("assistant", first), dog])
    anew = answer_by_transformers(chat_dir, [system, dog])
    assert out == f"{first}\n{second}\n{anew}\n"
    assert second != anew, "or the test could not tell whether the history was there"


def test_a_real_pipe(chat_dir):
    command = [sys.executable, "-m", "llama_lib", "generate", str(chat_dir), "--chat", *GREEDY]
    question = "na\u00efve?"
    done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=200)
    expected = answer_by_transformers(chat_dir, [turn("user", question)])
    assert (done.returncode, done.stdout) == (0, expected + "\n"), done.stderr
    assert "Ctrl-D" not in done.stderr


def test_any_of_the_end_tokens_ends_an_answer(base_dir, chat_dir, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(chat_dir)
    question = [turn("user", "the cat?")]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(chat_dir)
    free = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    place = next(place for place in range(3, 12) if free[place] not in free[:place])
    eos = [tokenizer.eos_token_id, free[place]]
    ending = chat_model(base_dir, tmp_path / "model", eos_token_id=eos)
    out, err = ask(capsys, ending, "--prompt", "the cat?", *GREEDY)
    whole = tokenizer.decode(free[: place + 1], skip_special_tokens=True).strip()
    assert (out, err) == (whole + "\n", "")


def test_an_answer_ends_where_the_context_does(chat_dir, capsys):
    out, err = ask(capsys, chat_dir, "--prompt", "the cat?", "--temperature", "0")
    assert err == f"(cut: the model's context of {CONTEXT} tokens is full)\n"
    question = [turn("user", "the cat?")]
    tokenizer = AutoTokenizer.from_pretrained(chat_dir)
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert out == answer_by_transformers(chat_dir, question, CONTEXT - len(prompt)) + "\n"


def test_sampled_answers_repeat_for_their_seed(chat_dir, capsys):
    words = ["--prompt", "the cat?", "--max_new_tokens", "12"]
    texts = [ask(capsys, chat_dir, *words, "--seed", seed)[0] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_template_of_one_question_begins_anew_each_time(base_dir, tmp_path, capsys, monkeypatch):
    folder = chat_model(base_dir, tmp_path / "model", ONE_TURN)
    type_in(monkeypatch, "the cat?\nthe dog?\n")
    out, err = ask(capsys, folder, *GREEDY)
    questions = [[turn("user", text)] for text in ("the cat?", "the dog?")]
    assert out == "".join(answer_by_transformers(folder, each) + "\n" for each in questions)
    assert "each begins anew" in err


# -- streaming ----------------------------------------------------------------------------------


def test_an_answer_comes_in_pieces_that_are_its_text():
    text = "na\u00efve \u6f22\u5b57 \U0001f600:\n\n    indented  twice\n\tend"
    tokenizer = train_tokenizer([TEXT], 260)
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([tokenizer("a prompt")["input_ids"]]))
    for token in tokenizer(f"  {text} \n")["input_ids"] + [tokenizer.eos_token_id]:
        stream.put(torch.tensor([token]))
    assert len(pieces) > 20 and "".join(pieces) == text, "all but the blanks around it, at once"
    stream.end()
    assert "".join(pieces) == stream.text == text


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    tokenizer = train_tokenizer([TEXT], 260)
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[0]]))
    stream.put(torch.tensor(tokenizer("a \u6f22")["input_ids"][:-1]))
    assert "".join(pieces) == "a"
    stream.end()
    assert "".join(pieces) == "a \ufffd"


# -- at a terminal ------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_says_what_went_wrong_and_goes_on(chat_dir, capsys, monkeypatch):
    questions = iter(["long " * CONTEXT, "the cat?"])

    def typed(prompt: str) -> str:
        try:
            return next(questions)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    out, err = ask(capsys, chat_dir, *GREEDY)
    # the question that was too long has left nothing behind
    assert out == answer_by_transformers(chat_dir, [turn("user", "the cat?")]) + "\n\n"
    assert "/exit" in err and f"fewer than {CONTEXT}" in err


# -- what is refused ----------------------------------------------------------------------------


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run_command(main, ["generate", *argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--prompt TEXT"),
        (["--system", "be brief", "--prompt", "x"], "give --chat too"),
        (["--chat", "--prompt", " "], "--prompt is empty"),
        (["--chat", "--prompt", "long " * CONTEXT], f"fewer than {CONTEXT}"),
        (["--prompt", "long " * CONTEXT], f"fewer than {CONTEXT}"),
        (["--chat", "--prompt", "x", "--max_new_tokens", "0"], "at least 1"),
    ],
)
def test_bad_arguments(chat_dir, capsys, words, message):
    assert message in refused([str(chat_dir), *words], capsys)


def test_a_piped_question_without_room_is_an_error(chat_dir, capsys, monkeypatch):
    type_in(monkeypatch, "long " * CONTEXT + "\nthe cat?\n")
    assert f"fewer than {CONTEXT}" in refused([str(chat_dir), "--chat", *GREEDY], capsys)


def test_no_chat_template(base_dir, capsys):
    message = refused([str(base_dir), "--chat", "--prompt", "x"], capsys)
    assert str(base_dir) in message and "no chat template" in message and "finetune.py" in message


def test_a_template_that_knows_no_system_turn(base_dir, tmp_path, capsys):
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        + TEMPLATE
    )
    folder = chat_model(base_dir, tmp_path / "model", template)
    message = refused([str(folder), "--chat", "--prompt", "x", "--system", "y"], capsys)
    assert "refuses this conversation: no system turns" in message


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{{ messages.nothing.more }}", "has no attribute 'nothing'"),
        ("{% for m in messages %}", "Unexpected end of template"),
    ],
)
def test_whatever_a_template_raises_is_told(base_dir, tmp_path, capsys, code, words):
    folder = chat_model(base_dir, tmp_path / "model", code)
    message = refused([str(folder), "--chat", "--prompt", "x"], capsys)
    assert f"{folder}: its chat template refuses this conversation: " in message
    assert words in message and "Traceback" not in message


# -- adapters -----------------------------------------------------------------------------------


@pytest.fixture
def adapter_dir(chat_dir: Path, tmp_path: Path) -> Path:
    """A finished checkpoint of nothing but adapters on `chat_dir`, as `--save_dir` holds it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(chat_dir)
    settings = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    checkpoint = tmp_path / "save" / "step-00000005"
    get_peft_model(model, settings).save_pretrained(checkpoint / "adapter")
    AutoTokenizer.from_pretrained(chat_dir).save_pretrained(checkpoint / "adapter")
    (checkpoint / "complete.json").write_text("{}")
    return checkpoint.parent


def test_adapters_answer_on_their_model(adapter_dir, chat_dir, capsys):
    out, _ = ask(capsys, adapter_dir, "--prompt", "the cat?", *GREEDY)
    question = [turn("user", "the cat?")]
    # transformers itself puts adapters on the model that their folder names
    adapter = adapter_dir / "step-00000005" / "adapter"
    assert out == answer_by_transformers(adapter, question) + "\n"
    assert out != answer_by_transformers(chat_dir, question) + "\n"


def test_adapters_whose_model_is_gone(adapter_dir, capsys):
    path = adapter_dir / "step-00000005" / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    for base, message in [("/no/such/model", "no such folder"), (None, "does not say")]:
        path.write_text(json.dumps({**settings, "base_model_name_or_path": base}))
        assert message in refused([str(adapter_dir), "--chat", "--prompt", "x"], capsys)


def test_adapters_whose_model_has_changed(adapter_dir, base_dir, tmp_path, capsys):
    base = chat_model(base_dir, tmp_path / "base")
    checkpoint = adapter_dir / "step-00000005"
    path = checkpoint / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    model = AutoModelForCausalLM.from_pretrained(base)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    facts = {"precision": "fp32", "sample": base_sample(model, shapes)}
    (checkpoint / "base.json").write_text(json.dumps(facts))
    out, _ = ask(capsys, checkpoint, "--prompt", "the cat?", *GREEDY)
    assert out.strip()
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.001)
    model.save_pretrained(base)
    message = refused([str(checkpoint), "--chat", "--prompt", "x"], capsys)
    assert "another model" in message and "layers.1.mlp.up_proj.weight" in message


def test_adapters_are_no_model_to_start_from(adapter_dir, chat_dir):
    with pytest.raises(UserError, match="--merge_lora"):
        model_folder(str(adapter_dir))
    (adapter_dir / "step-00000005" / "model").mkdir()
    assert model_folder(str(adapter_dir)) == adapter_dir / "step-00000005" / "model"


def test_adapters_end_answers_with_tokens_of_their_own(adapter_dir, chat_dir, capsys):
    whole, _ = ask(capsys, adapter_dir, "--prompt", "the cat?", *GREEDY)
    tokenizer = AutoTokenizer.from_pretrained(chat_dir)
    adapter = adapter_dir / "step-00000005" / "adapter"
    inputs = tokenizer.apply_chat_template(
        [turn("user", "the cat?")], add_generation_prompt=True, return_tensors="pt"
    )
    model = AutoModelForCausalLM.from_pretrained(adapter)
    free = model.generate(inputs, max_new_tokens=12, do_sample=False)[0, inputs.shape[1] :].tolist()
    place = next(place for place in range(3, 12) if free[place] not in free[:place])
    GenerationConfig(eos_token_id=[2, free[place]]).save_pretrained(adapter)
    out, err = ask(capsys, adapter_dir, "--prompt", "the cat?", *GREEDY)
    assert err == "" and whole.startswith(out.strip()) and len(out) < len(whole)


def test_the_loss_of_adapters(adapter_dir, chat_dir, tmp_path, capsys):
    """Through `evaluate`, with the weights of the adapters merged into the model by peft."""
    from peft import AutoPeftModelForCausalLM

    adapter = adapter_dir / "step-00000005" / "adapter"
    merged = tmp_path / "merged"
    AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(merged)
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": TEXT}) + "\n")
    losses = []
    for folder in (adapter_dir, merged, chat_dir):
        argv = ["evaluate", str(folder), "-d", str(data), "--cache_dir", str(tmp_path / "cache")]
        assert main(argv) == 0
        losses.append(float(capsys.readouterr().out.splitlines()[-1].split()[1]))
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert abs(losses[0] - losses[2]) > 0.01
