"""Checks of answers that run inside a process group; see checks.py.

Invariant: every rank returns the same; what the data must be is said in the tests, not here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from llama_lib.checkpoint import store
from llama_lib.data.chat.messages import Example, Message
from llama_lib.data.chat.templates import ChatTemplate, use_template
from llama_lib.data.tokenizer import train_tokenizer
from llama_lib.engine import Engine
from llama_lib.layout import BatchPlan
from llama_lib.optim import set_learning_rate
from llama_lib.samples import answers
from tests.distributed.cases import LENGTH, SEED
from tests.distributed.checks import build, micro_batches, rows_per_step
from tests.distributed.plain_loop import IGNORED, num_labels

Report = dict[str, Any]

TAUGHT = {"What is one?": "The first.", "What is two?": "It comes after one."}
UNKNOWN = "after first is the what?"
TRAINING_STEPS = 80


def answered(layout: str, precision: str, folder: Path) -> Report:
    """Answers of a model that was taught some, by the engine and by transformers from its save."""
    engine = build(layout, precision)
    text = " ".join([*TAUGHT, *TAUGHT.values(), "user\n assistant\n"])
    tokenizer = train_tokenizer([text] * 3, 320)
    use_template(tokenizer, "chatml", {"conversation"})
    template = ChatTemplate(tokenizer)
    _teach(engine, template)
    training = engine.options.training
    plan = BatchPlan(
        batch_size=training.batch_size,
        dp=engine.layout.dp,
        accumulation=training.accumulation_steps,
        max_length=LENGTH,
        num_steps=TRAINING_STEPS,
        dropped_rows=0,
        warmup_steps=0,
    )
    prompts = [*TAUGHT, UNKNOWN]
    generator_before = torch.get_rng_state()
    found = answers(engine, tokenizer, prompts, plan, template.end_token_ids)
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, found)
    state = store.TrainerState(TRAINING_STEPS, 0, 0, 0, SEED, {})
    path = store.save(engine, state, tokenizer, str(folder), None)
    served = LlamaForCausalLM.from_pretrained(path / "model", torch_dtype="auto")
    cut = answers(engine, tokenizer, prompts[:1], plan, template.end_token_ids, max_new_tokens=1)
    return {
        "answers": found,
        "by_rank": by_rank,
        "served": [_served(served, tokenizer, template, prompt) for prompt in prompts],
        "cut": cut[0],
        "random_state_kept": torch.equal(generator_before, torch.get_rng_state()),
    }


def _teach(engine: Engine, template: ChatTemplate) -> None:
    """Some steps on all taught conversations, every token a label."""
    rows = rows_per_step(engine)
    ids = torch.zeros(rows, LENGTH, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    conversations = [
        template.encode(Example((Message("user", question), Message("assistant", answer))))
        for question, answer in TAUGHT.items()
    ]
    for row in range(rows):
        known = torch.from_numpy(conversations[row % len(conversations)].ids).long()
        ids[row, : len(known)] = labels[row, : len(known)] = known
    batches = micro_batches(engine, ids, labels)
    set_learning_rate(engine.optimizer, 5e-3)
    for _ in range(TRAINING_STEPS):
        engine.forward_backward(batches, num_labels(labels))
        engine.step()


def _served(model: Any, tokenizer: Any, template: ChatTemplate, prompt: str) -> str:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LENGTH - ids.shape[1],
        do_sample=False,
        eos_token_id=template.end_token_ids,
        pad_token_id=0,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


CHECKS: dict[str, Callable[[str, str, Path], Report]] = {"answered": answered}
