"""What the model in training writes: samples of text, and answers to prompts.

Invariant: neither reads or moves the training stream's data position or random state; every rank
writes the same.
"""

from __future__ import annotations

import math
import os.path
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from llama_lib.errors import UserError
from llama_lib.progress import made

if TYPE_CHECKING:
    # Reading prompts needs nothing of what training imports.
    from llama_lib.engine import Engine
    from llama_lib.evaluate import HeldOut
    from llama_lib.layout import BatchPlan

SAMPLE_TOKENS = 48
PROMPT_TOKENS = 8
TEMPERATURE = 0.8
ANSWER_TOKENS = 128  # one forward pass each; chosen

# What names a file, there or not; those of records are no texts of prompts.
_RECORDS = (".jsonl", ".json")
_SUFFIXES = (".txt", ".md", *_RECORDS)

# Rows are made longer in steps of this: few shapes for the allocator, little padding. Chosen.
_ROW_MULTIPLE = 64


def sample_text(
    engine: Engine, tokenizer: Any, held_out: HeldOut | None, plan: BatchPlan, step: int
) -> str:
    """Text the model writes after the first tokens of a held-out document (else after EOS)."""
    ids = [tokenizer.eos_token_id]
    if held_out is not None and held_out.dataset.num_documents:
        text = held_out.dataset.tokens(0)[:PROMPT_TOKENS].tolist()
        ids = [each for each in text if each != tokenizer.eos_token_id] or ids
    generator = torch.Generator().manual_seed(engine.options.training.seed + step)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(torch.softmax(logits / TEMPERATURE, -1), 1, generator=generator)

    ends = [tokenizer.eos_token_id]
    return tokenizer.decode(ids + _new_ids(engine, plan, ids, SAMPLE_TOKENS, ends, choose))


def read_prompts(given: Sequence[str]) -> list[str]:
    """The prompts of --sample_prompts: each is one, or a file of one a line.

    Raises:
        UserError: a file is not UTF-8 text or has no prompt, or nothing is asked.
    """
    prompts, problems = [], []
    for word in given:
        suffix = os.path.splitext(word)[1]
        if os.path.isfile(os.path.expanduser(word)):
            if suffix in _RECORDS:
                problems.append(
                    f"--sample_prompts {word} holds records: expected a text file with one prompt "
                    "on each line."
                )
                continue
            try:
                lines = Path(word).expanduser().read_text("utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"--sample_prompts {word} cannot be read as UTF-8 text: {error}")
                continue
            found = [line for line in lines if line.strip()]
            if not found:
                problems.append(
                    f"--sample_prompts {word} has no prompt: expected one on each line."
                )
            prompts += found
        elif (suffix in _SUFFIXES or "/" in word) and len(word.split()) == 1:
            problems.append(
                f"--sample_prompts {word}: there is no such file. A prompt that is one word with "
                "a slash is put into a file."
            )
        elif not word.strip():
            problems.append("--sample_prompts: got an empty prompt, expected a text or a file.")
        else:
            prompts.append(word)
    if problems:
        raise UserError(problems)
    return prompts


def prompt_problems(tokenizer: Any, prompts: Sequence[str], max_length: int) -> list[str]:
    """The prompts that leave no room for an answer in rows of `max_length` tokens."""
    problems = []
    for prompt in prompts:
        length = len(_prompt_ids(tokenizer, prompt))
        if length >= max_length:
            shown = prompt if len(prompt) <= 40 else prompt[:37] + "..."
            problems.append(
                f"--sample_prompts {shown!r} has {length} tokens: expected fewer than --max_length "
                f"{max_length}."
            )
    return problems


def answers(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[str],
    plan: BatchPlan,
    end_token_ids: Collection[int],
    max_new_tokens: int = ANSWER_TOKENS,
) -> list[str]:
    """The likeliest answers to prompts, as turns of a user through the tokenizer's chat template.

    An answer ends with an end token, after `max_new_tokens` or where a row of training ends. Called
    by all ranks, which all get it.

    Args:
        prompts: those without `prompt_problems`.
    """
    found = []
    for prompt in prompts:
        ids = _prompt_ids(tokenizer, prompt)
        new = _new_ids(engine, plan, ids, max_new_tokens, end_token_ids, _likeliest)
        text = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found.append(text.strip())
    return found


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax().reshape(1)


def _new_ids(
    engine: Engine,
    plan: BatchPlan,
    ids: Sequence[int],
    limit: int,
    end_token_ids: Collection[int],
    choose: Callable[[torch.Tensor], torch.Tensor],
) -> list[int]:
    """At most `limit` ids after `ids`, each what `choose` takes from the logits [vocabulary].

    One forward pass per token through the training layout, so it works wherever training does.
    """
    text = list(ids)
    last = min(len(text) + limit, plan.max_length)
    num_rows, length = _row_shape(engine, plan, last)
    while len(text) < last:
        rows = torch.zeros(num_rows, length, dtype=torch.long)
        rows[0, : len(text)] = torch.tensor(text)
        logits = engine.next_token_logits(rows, len(text) - 1).cpu()
        choice = choose(logits).to(engine.device)
        dist.broadcast(choice, 0)  # rounding differs between hosts; the text must not
        text.append(int(choice.item()))
        made()
        if text[-1] in end_token_ids:
            break
    return text[len(ids) :]


def _row_shape(engine: Engine, plan: BatchPlan, tokens: int) -> tuple[int, int]:
    """(rows, length) of a forward pass that holds `tokens` tokens in its first row."""
    if engine.layout.pp > 1:  # a pipeline keeps the shapes of a training step
        return plan.batch_size * plan.accumulation, plan.max_length
    multiple = _ROW_MULTIPLE * engine.layout.sequence_axis
    return 1, min(math.ceil(tokens / multiple) * multiple, plan.max_length)
