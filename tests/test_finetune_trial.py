"""`make pretrain`, then `make finetune`: trained questions are answered in the trained words.

Asked by plain transformers through the chat template, and by `llama_lib generate --chat`.
"""

import itertools
import json
import random
import re
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml

from llama_lib.checkpoint.manifest import step_directories
from llama_lib.checkpoint.verify import checkpoint_problems
from llama_lib.config import parse_options
from llama_lib.data.chat.sample import sample_conversations

ROOT = Path(__file__).parents[1]
PROMISED_SECONDS = 120
PROMISED_CORES = 2


def recipe(target: str) -> list[str]:
    """The command that `make target` runs after the installation, with absolute paths."""
    makefile = (ROOT / "Makefile").read_text()
    (command,) = re.findall(rf"^{target}: install\n\t(.+)$", makefile, re.M)
    words = command.replace("$(BIN)/python", sys.executable).replace(" $(RUN_ARGS)", "").split()
    return [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]


def run(command: list[str], folder: Path, **arguments: str) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=1800, **arguments
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def questions() -> Iterator[tuple[list[dict[str, str]], str]]:
    """(turns up to a question, its trained answer) for every answer of the sample."""
    for record in sample_conversations():
        messages = record["messages"]
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                yield messages[:number], message["content"]


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def unseen_talks(count: int) -> Iterator[tuple[list[dict[str, str]], str]]:
    """(turns up to the second question, its answer): that followed the first in no conversation."""
    single, followed = {}, set()
    for record in sample_conversations():
        asked = [m["content"] for m in record["messages"] if m["role"] == "user"]
        followed.update(itertools.pairwise(asked))
        if len(asked) == 1:
            single[asked[0]] = record["messages"]
    unseen = [pair for pair in itertools.permutations(single, 2) if pair not in followed]
    for first, second in random.Random(0).sample(unseen, count):
        yield [*single[first], single[second][0]], single[second][1]["content"]


def check_answers(folder: Path, asked: Iterable[tuple[list[dict[str, str]], str]]) -> None:
    """Plain transformers, as any server of Hugging Face models does it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    # Without the cache an answer takes some ten times as long.
    assert model.generation_config.use_cache
    ends = model.generation_config.eos_token_id
    different = []
    for turns, answer in asked:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60
        )
        written = output[0, ids.size(1) :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        if text != answer or written[-1] not in ends:
            different.append((turns[-1]["content"], answer, tokenizer.decode(written)))
    assert different == []


def test_the_spec_of_the_demo_takes_what_make_pretrain_leaves() -> None:
    pretrain, finetune = (
        parse_options(target, recipe(target)[2:]) for target in ("pretrain", "finetune")
    )
    assert finetune.model.model_path == pretrain.checkpoint.save_dir
    assert finetune.checkpoint.save_dir != pretrain.checkpoint.save_dir
    assert finetune.report.tensorboard_dir != pretrain.report.tensorboard_dir
    # Both folders are named as git leaves them out.
    ignored = (ROOT / ".gitignore").read_text().split()
    assert f"/{finetune.checkpoint.save_dir}/" in ignored
    assert any(f"/{finetune.report.tensorboard_dir}/".startswith(line) for line in ignored)
    asked = {turns[-1]["content"] for turns, _ in questions()}
    assert finetune.report.sample_prompts and set(finetune.report.sample_prompts) <= asked


@pytest.mark.full
def test_make_pretrain_and_make_finetune_end_in_a_model_that_answers(tmp_path: Path) -> None:
    # A sixth of the demo's steps: less of a start than its users have.
    run([*recipe("pretrain"), "--max_steps", "100"], tmp_path)
    before = cpu_seconds()
    output = run(recipe("finetune"), tmp_path)
    assert cpu_seconds() - before < PROMISED_SECONDS * PROMISED_CORES
    assert output.splitlines()[-1].startswith("max memory usage:  ")

    spec = yaml.safe_load((ROOT / "specs" / "finetune_demo.yaml").read_text())
    newest = step_directories(tmp_path / spec["save_dir"])[0]
    assert checkpoint_problems(newest) == []
    records = [
        json.loads(line) for line in (tmp_path / spec["tensorboard_dir"] / "metrics.jsonl").open()
    ]
    assert records[-1]["loss"] < 0.05 < 1 < records[0]["loss"]
    check_answers(newest / "model", itertools.chain(questions(), unseen_talks(12)))

    answers = {turns[0]["content"]: answer for turns, answer in questions() if len(turns) == 1}
    for prompt in spec["sample_prompts"]:
        assert f"asked at step {records[-1]['step']}: {prompt!r} -> {answers[prompt]!r}" in output
    generate = [sys.executable, "-m", "llama_lib", "generate", str(newest), "--chat"]
    question = "What does textwrap.dedent do?"
    greedy = ["--temperature", "0"]
    assert run([*generate, *greedy, "--prompt", question], ROOT).strip() == answers[question]
    turns, answer = next(pair for pair in questions() if len(pair[0]) == 4)
    lines = "".join(f"{turn['content']}\n" for turn in turns if turn["role"] == "user")
    talk = [*generate, *greedy, "--system", turns[0]["content"]]
    assert answer in run(talk, ROOT, input=lines)
