"""Real conversations as the fine-tuning checks train on them: alone, padded and packed.

Invariant: ids and labels come from transformers' apply_chat_template and its own marks of what the
assistant says; nothing of this project's templates, labels and packing takes part.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_lib.data.chat.sample import sample_conversations
from llama_lib.data.tokenizer import train_tokenizer
from tests.distributed.cases import MODEL
from tests.distributed.plain_loop import IGNORED

# Holds the longest conversation.
ROW = 192

OTHER_WEIGHT = 0.25

# ChatML; what stands for MARKED is marked as if it were the assistant's. A newline that follows a
# block directly is left out by transformers.
_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n"
    "{% if turn.role == 'MARKED' %}"
    "{% generation %}{{ turn.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ turn.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)


@dataclass(frozen=True)
class Conversation:
    """Token ids [n] and what each counts as a label, fp32 [n]: answers 1, other turns 0.25."""

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Rows:
    """[rows, ROW] each; `documents` numbers the conversations of a row, and the padding."""

    ids: Tensor
    labels: Tensor
    documents: Tensor
    weights: Tensor


def records() -> list[list[dict[str, str]]]:
    """Of the built-in sample, lists of {"role", "content"}: single questions, and those with a
    system message."""
    found = [record["messages"] for record in sample_conversations()]
    return [turns for turns in found if len(turns) == 2 or turns[0]["role"] == "system"]


@functools.cache
def tokenizer() -> Any:
    """Of the model's vocabulary, with ChatML's tokens."""
    texts = [turn["content"] for messages in records() for turn in messages]
    found = train_tokenizer(texts, MODEL["vocab_size"] - 2)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert len(found) <= MODEL["vocab_size"]
    return found


@functools.cache
def conversations() -> list[Conversation]:
    """The sample's, in its order."""
    return [_conversation(messages) for messages in records()]


def _conversation(messages: list[dict[str, str]]) -> Conversation:
    weights: Any = 0.0
    for role, weight in (("assistant", 1.0), ("user", OTHER_WEIGHT), ("system", OTHER_WEIGHT)):
        encoded = tokenizer().apply_chat_template(
            messages,
            chat_template=_TEMPLATE.replace("MARKED", role),
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        weights = weights + weight * torch.tensor(encoded["assistant_masks"])
    ids = torch.tensor(encoded["input_ids"])
    assert len(ids) <= ROW
    return Conversation(ids, weights)


def step_conversations(step: int, rows: int, packed: bool) -> list[list[Conversation]]:
    """The conversations of each row of a step; the first row has the shortest of all alone.

    So rows, micro-batches and ranks weigh differently in the mean.
    """
    known = conversations()
    generator = torch.Generator().manual_seed(step)
    filled = [[min(known, key=lambda each: len(each.ids))]]
    while len(filled) < rows:
        row: list[Conversation] = []
        while True:
            index = int(torch.randint(len(known), (), generator=generator))
            if sum(len(each.ids) for each in [*row, known[index]]) > ROW:
                break
            row.append(known[index])
            if not packed:
                break
        filled.append(row)
    return filled


def in_rows(filled: list[list[Conversation]]) -> Rows:
    """Conversations laid end to end, then padding with labels and documents of its own."""
    rows = Rows(
        ids=torch.zeros(len(filled), ROW, dtype=torch.long),
        labels=torch.full((len(filled), ROW), IGNORED),
        documents=torch.zeros(len(filled), ROW, dtype=torch.int32),
        weights=torch.zeros(len(filled), ROW),
    )
    for row, parts in enumerate(filled):
        start = 0
        for number, part in enumerate(parts):
            stop = start + len(part.ids)
            rows.ids[row, start:stop] = part.ids
            rows.labels[row, start + 1 : stop] = part.ids[1:]
            rows.documents[row, start:stop] = number
            rows.weights[row, start:stop] = part.weights
            start = stop
        rows.documents[row, start:] = len(parts)
    return rows
