"""Runs of finetune.py as a user sees them: resumed to the bit, the best kept, rows traceable."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama_lib.checkpoint.manifest import step_directories, step_directory
from llama_lib.data.tokenizer import train_tokenizer
from llama_lib.step_view import passages_of_step
from tests.distributed.cases import MODEL
from tests.distributed.launching import Outcome, run, start
from tests.distributed.test_resume import COMPARED, Folder

pytestmark = pytest.mark.distributed

STEPS, KILLED_AFTER = 10, 5
WORDS = ["red", "green", "blue", "grey", "one", "two", "three", "sea", "sky", "hill", "tree"]

LAYOUTS = {
    "zero2": "-p zero2 -b 16",
    "zero2_cpu": "-p zero2_cpu -b 8 --accumulation_steps 2",
    "zero2_other_roles": "-p zero2 -b 16 --other_role_weight 0.1",
    "zero2_lora": "-p zero2 -b 16 --lora_rank 4 --lora_alpha 64 --chat_template llama-2",
    "gemini": "-p gemini -b 16",
    "gemini_auto": "-p gemini_auto -b 16",
    "hybrid_zero1": "-p hybrid_parallel -b 16",
    "hybrid_lora": "-p hybrid_parallel -b 16 --lora_rank 4 --lora_alpha 64 --chat_template llama-2",
    "tp2": "-p hybrid_parallel --tp 2 -b 32",
    "pp2": "-p hybrid_parallel --pp 2 -b 32 --microbatch_size 8 --no_packing",
    "all_to_all": "-p hybrid_parallel --sp 2 --sp_mode all_to_all -b 32 --no_packing",
}


def conversations(count: int) -> list[dict[str, object]]:
    """One to three questions each, with answers of one to six words."""
    draw = random.Random(7)

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    found = []
    for _ in range(count):
        turns = []
        for _ in range(draw.randint(1, 3)):
            turns.append({"role": "user", "content": words(4)})
            turns.append({"role": "assistant", "content": words(6)})
        found.append({"messages": turns})
    return found


@pytest.fixture(scope="module")
def chat_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base model whose tokenizer has no template, conversations, a record of every step."""
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**MODEL, "vocab_size": 300})).save_pretrained(folder / "base")
    train_tokenizer([" ".join(WORDS)] * 9, 300).save_pretrained(folder / "base")
    lines = "".join(json.dumps(record) + "\n" for record in conversations(1000))
    (folder / "chats.jsonl").write_text(lines)
    common = f"-d {folder / 'chats.jsonl'} --cache_dir {folder / 'cache'} --eval_ratio 0.05"
    common += " -l 64 --lr 1e-3 -s 2 -e 20 --log_interval 1 --workers 1"
    return ["--model_path", str(folder / "base"), *common.split()]


def without_model(flags: Sequence[str]) -> list[str]:
    place = list(flags).index("--model_path")
    return [*flags[:place], *flags[place + 2 :]]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if name == "zero2" else pytest.mark.full) for name in LAYOUTS],
)
def test_killed_and_resumed_is_the_same_run(
    layout: str, chat_flags: list[str], tmp_path: Path
) -> None:
    """10 steps == 5 steps, kill -9, --load auto without --model_path, 5 steps: to the bit."""
    limits = ["--max_steps", str(STEPS), "-i", str(KILLED_AFTER)]
    command = [*chat_flags, *LAYOUTS[layout].split(), *limits]
    straight, broken = Folder(tmp_path / "straight"), Folder(tmp_path / "broken")
    outcome = run("finetune.py", straight.arguments(*command), straight.log("run"), processes=2)
    assert outcome.code == 0, outcome.output

    first = broken.arguments(*command)
    with start("finetune.py", first, broken.log("first"), processes=2) as started:
        started.wait_until(step_directory(broken.save_dir, KILLED_AFTER).exists)
        started.kill()
    assert [d.name for d in step_directories(broken.save_dir)] == ["step-00000005"]
    second = [*without_model(first), "--load", "auto"]
    outcome = run("finetune.py", second, broken.log("second"), processes=2)
    assert outcome.code == 0, outcome.output
    assert f"resumed {step_directory(broken.save_dir, KILLED_AFTER)} at step 5" in outcome.output

    assert [record["step"] for record in broken.records] == list(range(1, STEPS + 1))
    for expected, found in zip(straight.records, broken.records, strict=True):
        assert {k: found[k] for k in COMPARED} == {k: expected[k] for k in COMPARED}
    assert straight.records[-1]["loss"] < straight.records[0]["loss"] - 0.3
    assert broken.batches() == straight.batches()
    assert len(straight.batches()) == 2 * STEPS
    for name in ("samples", "tokens", "epoch", "scaler", "schedule", "best"):
        assert broken.state(STEPS)[name] == straight.state(STEPS)[name]


@pytest.fixture(scope="module")
def finished(
    chat_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Folder, Outcome]:
    """One process; the held-out answers are words that training makes less likely with every step,
    so an early checkpoint is the best, and only one is to be kept."""
    folder = Folder(tmp_path_factory.mktemp("finished"))
    answers = {"chats": "red green blue grey " * 3, "held_out": "sea sky hill tree " * 3}
    for name, answer in answers.items():
        turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": answer}]
        lines = (json.dumps({"messages": turns}) + "\n") * 200
        (folder.root / f"{name}.jsonl").write_text(lines)
    flags = list(chat_flags)
    flags[flags.index("-d") + 1] = str(folder.root / "chats.jsonl")
    at = flags.index("--eval_ratio")
    flags[at : at + 2] = ["--eval_data", str(folder.root / "held_out.jsonl")]
    flags[flags.index("--lr") + 1] = "1e-2"
    once = "-p zero2 -b 8 --max_steps 12 -i 2 --keep_last 1 --eval_interval 3 --sample_prompts red"
    outcome = run("finetune.py", folder.arguments(*flags, *once.split()), folder.log("run"))
    assert outcome.code == 0, outcome.output
    return folder, outcome


def test_the_best_checkpoint_is_kept_beside_the_last(finished: tuple[Folder, Outcome]) -> None:
    folder, outcome = finished
    measured = [json.loads(line) for line in (folder.root / "tb" / "eval.jsonl").open()]
    assert [record["step"] for record in measured] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert all(0 <= record["accuracies"]["all"] <= 1 for record in measured)
    losses = {r["step"]: r["losses"]["all"] for r in measured if r["step"] % 2 == 0}
    best = min(losses, key=losses.__getitem__)
    assert best < 12, "training does not make the held-out answers less likely"
    names = [directory.name for directory in step_directories(folder.save_dir)]
    assert names == ["step-00000012", f"step-{best:08}"]
    assert (folder.save_dir / "best").read_text() == f"step-{best:08}\n"
    assert folder.state(12)["best"] == {"step": best, "loss": losses[best], "rows": 160}
    assert f"best        {step_directory(folder.save_dir, best)}" in outcome.output
    assert "token accuracy" in outcome.output and "asked at step 12: 'red' -> " in outcome.output


def test_the_model_is_served_with_its_template(finished: tuple[Folder, Outcome]) -> None:
    """Two tokens more than the base, both of which end nothing by mistake: one ends answers."""
    folder = step_directory(finished[0].save_dir, 12) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [end, tokenizer.eos_token_id]
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size
    turns = [{"role": "user", "content": "red"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"


def test_every_step_can_be_traced_to_its_conversations(finished: tuple[Folder, Outcome]) -> None:
    rows = passages_of_step(str(finished[0].save_dir), 3)
    assert len(rows) == 8
    for _, passages in rows:
        assert sum(part.length for part in passages) <= 64
        assert all(part.start == 0 and part.file == "chats.jsonl" for part in passages)


def test_a_run_of_pretraining_is_not_continued(
    finished: tuple[Folder, Outcome], flags: list[str], tmp_path: Path
) -> None:
    folder = Folder(tmp_path)
    checkpoint = step_directory(finished[0].save_dir, 12)
    command = folder.arguments(*flags, "--max_steps", "20", "--load", str(checkpoint))
    outcome = run("pretrain.py", command, folder.log("run"))
    assert outcome.code == 2
    assert f"{checkpoint} is of finetune.py" in outcome.output
    assert f"--model_path {checkpoint}" in outcome.output
