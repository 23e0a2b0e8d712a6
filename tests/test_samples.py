"""What is asked during training: prompts, and answers of one process against transformers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_lib import samples
from llama_lib.data.tokenizer import train_tokenizer
from llama_lib.errors import UserError
from llama_lib.samples import answers, prompt_problems, read_prompts, sample_text

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LENGTH = 80


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 3, 270)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class OneProcess:
    """next_token_logits of an engine, with the shapes it was given."""

    def __init__(self, pp: int = 1) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=270,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.3,
        )
        self.model = LlamaForCausalLM(config).eval()
        self.layout = SimpleNamespace(pp=pp, sequence_axis=1)
        self.options = SimpleNamespace(training=SimpleNamespace(seed=1))
        self.device = torch.device("cpu")
        self.shapes: list[tuple[int, ...]] = []

    def next_token_logits(self, rows: torch.Tensor, position: int) -> torch.Tensor:
        self.shapes.append(tuple(rows.shape))
        with torch.no_grad():
            return self.model(rows[:1]).logits[0, position]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples.dist, "broadcast", lambda tensor, source: None)


PLAN = SimpleNamespace(batch_size=2, accumulation=3, max_length=LENGTH)


def by_transformers(engine: OneProcess, tokenizer: Any, prompt: str, tokens: int) -> list[int]:
    turns = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    tokens = min(tokens, LENGTH - ids.shape[1])
    mask = torch.ones_like(ids)
    found = engine.model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
    return found[0, ids.shape[1] :].tolist()


def text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("limit", [5, 10**6])
def test_answers_are_greedy_ones_up_to_the_limit(tokenizer, limit):
    engine = OneProcess()
    prompts = ["the cat", "sat on the"]
    found = answers(engine, tokenizer, prompts, PLAN, [2], limit)
    expected = [by_transformers(engine, tokenizer, prompt, limit) for prompt in prompts]
    assert found == [text(tokenizer, ids) for ids in expected]
    assert len(engine.shapes) == sum(map(len, expected))
    # rows are no longer than the answers may become, or than a row of training
    assert set(engine.shapes) == {(1, 64 if limit == 5 else LENGTH)}


def test_every_end_token_ends_an_answer(tokenizer):
    engine = OneProcess()
    free = by_transformers(engine, tokenizer, "the cat", 20)
    place = next(place for place in range(3, 20) if free[place] not in free[:place])
    found = answers(engine, tokenizer, ["the cat"], PLAN, [2, free[place]])
    assert found == [text(tokenizer, free[: place + 1])] and len(engine.shapes) == place + 1


def test_a_pipeline_keeps_the_shape_of_a_step(tokenizer):
    engine = OneProcess(pp=2)
    answers(engine, tokenizer, ["the cat"], PLAN, [2], 3)
    assert set(engine.shapes) == {(6, LENGTH)}


def test_sampled_texts_repeat_for_their_step(tokenizer):
    texts = [sample_text(OneProcess(), tokenizer, None, PLAN, step) for step in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# -- prompts ------------------------------------------------------------------------------------


def test_prompts_are_texts_or_lines_of_files(tmp_path):
    path = tmp_path / "prompts"
    path.write_text("  first \n\nna\u00efve?\n", encoding="utf-8")
    assert read_prompts(["ask me", str(path), "last"]) == [
        "ask me",
        "  first ",
        "na\u00efve?",
        "last",
    ]
    assert read_prompts([]) == []
    assert read_prompts(["x" * 5000]) == ["x" * 5000], "longer than any path"


def test_prompts_that_cannot_be_meant(tmp_path):
    blank, binary = tmp_path / "blank", tmp_path / "binary"
    blank.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError) as caught:
        read_prompts([str(blank), str(binary), "missing.txt", " ", "fine"])
    problems = caught.value.problems
    assert [str(blank) in problems[0], str(binary) in problems[1]] == [True, True]
    assert "missing.txt" in problems[2] and "empty prompt" in problems[3] and len(problems) == 4


@pytest.mark.parametrize("word", ["a.txt", "a.md", "a.jsonl", "a.json", "prompts/a", "~/prompts/a"])
def test_a_word_that_looks_like_a_file_is_one(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="there is no such file"):
        read_prompts([word])
    # Prose may hold slashes and names of files.
    for prompt in (f"what is in {word}", "is it 1/2?", "Why?", "e.g."):
        assert read_prompts([prompt]) == [prompt]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_records_are_no_prompts(suffix, tmp_path):
    path = tmp_path / f"chats.{suffix}"
    path.write_text('{"prompt": "Why?", "completion": "So."}\n')
    with pytest.raises(UserError, match=f"{path} holds records: expected a text file"):
        read_prompts([str(path)])


def test_prompts_without_room_for_an_answer(tokenizer):
    short, long = "the cat", "the cat " * 30
    length = len(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": short}], add_generation_prompt=True
        )
    )
    assert prompt_problems(tokenizer, [short], length + 1) == []
    assert len(prompt_problems(tokenizer, [short], length)) == 1
    (problem,) = prompt_problems(tokenizer, [short, long], length + 1)
    assert "--max_length" in problem and len(problem) < 200
