"""Loss and accuracy of a chat model on held-out answers, by plain transformers code.

Invariant: nothing of this project's templates, labels and engine is used; conversations are
encoded as a server would encode them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_lib.data.chat.records import ExampleFile


def score(model: Path, tokenizer: Path, data: Path, max_length: int) -> dict[str, Any]:
    """Mean loss and accuracy over the completions' tokens, the end token among them.

    Conversations are cut to `max_length` tokens as in training, those without a label left out.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    template = AutoTokenizer.from_pretrained(tokenizer)
    network = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32).eval()
    totals = {"loss": 0.0, "correct": 0, "labels": 0, "conversations": 0, "cut": 0, "left_out": 0}
    for turns in _conversations(data):
        ids, first = completion_ids(template, turns)
        totals["cut"] += len(ids) > max_length
        ids = ids[:max_length]
        if len(ids) <= first:
            totals["left_out"] += 1
            continue
        with torch.no_grad():
            logits = network(torch.tensor([ids])).logits[0, first - 1 : -1]
        labels = torch.tensor(ids[first:])
        totals["loss"] += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        totals["correct"] += int((logits.argmax(-1) == labels).sum())
        totals["labels"] += len(labels)
        totals["conversations"] += 1
    if not totals["labels"]:
        raise SystemExit(f"{data} has no completion within {max_length} tokens")
    totals["loss"] /= totals["labels"]
    return totals | {"accuracy": totals["correct"] / totals["labels"]}


def _conversations(path: Path) -> Iterator[list[dict[str, str]]]:
    for _, example in ExampleFile(path, skip_bad_lines=False):
        yield [{"role": turn.role, "content": turn.content} for turn in example.messages]


def completion_ids(tokenizer: Any, turns: list[dict[str, str]]) -> tuple[list[int], int]:
    """(ids of a conversation, index of its answer's first token), by the chat template."""
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begins = [begin for begin, _ in encoded["offset_mapping"]]
    first = next((n for n, begin in enumerate(begins) if begin >= len(prompt)), len(begins))
    return encoded["input_ids"], first
