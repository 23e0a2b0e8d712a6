"""Checks of the loss and gradient of fine-tuning that run inside a process group; see checks.py.

Invariant: every rank returns the same; what the data must be is said in the tests, not here.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from llama_lib.checkpoint.state import gather_weights
from llama_lib.data.chat.templates import use_template
from llama_lib.data.chat.training import ChatRequest, chat_data
from llama_lib.data.loader import BatchLoader
from llama_lib.engine import Engine, MicroBatch
from llama_lib.optim import learning_rate, set_learning_rate
from tests.distributed import plain_loop
from tests.distributed.cases import LEARNING_RATE, STEPS, WARMUP, model_type
from tests.distributed.checks import build, merged, micro_batches, plain_weights, rows_per_step
from tests.distributed.conversations import (
    OTHER_WEIGHT,
    ROW,
    Conversation,
    Rows,
    conversations,
    in_rows,
    records,
    step_conversations,
    tokenizer,
)

# Half the rate of the other checks: on text it is the highest without a leap of the gradient norm,
# and leaps multiply rounding.
PEAK = LEARNING_RATE / 2

Report = dict[str, Any]


def _flat(filled: list[list[Conversation]]) -> list[Conversation]:
    return [each for row in filled for each in row]


def _num_labels(parts: list[Conversation]) -> float:
    return sum(float(part.weights[1:].sum()) for part in parts)


def _batches(engine: Engine, rows: Rows, packed: bool) -> list[MicroBatch]:
    documents = rows.documents if packed else None
    return micro_batches(engine, rows.ids, rows.labels, documents, rows.weights)


def _is_packed(engine: Engine) -> bool:
    return engine.options.model.document_mask


def _train_step(engine: Engine, step: int) -> tuple[float, float | None]:
    packed = _is_packed(engine)
    filled = step_conversations(step, rows_per_step(engine), packed)
    batches = _batches(engine, in_rows(filled), packed)
    return _optimize(engine, step, batches, _num_labels(_flat(filled)))


def _optimize(
    engine: Engine, step: int, batches: list[MicroBatch], num_labels: float
) -> tuple[float, float | None]:
    set_learning_rate(engine.optimizer, learning_rate(step, STEPS, WARMUP, PEAK))
    share = engine.forward_backward(batches, num_labels)
    return engine.reduce_loss(share), engine.step().value


def _alone(model: Any, part: Conversation) -> tuple[Tensor, Tensor]:
    """(weighted loss sum, labels that are the likeliest token) of a conversation by itself."""
    logits = model(input_ids=part.ids[None]).logits[0, :-1]
    losses = cross_entropy(logits.float(), part.ids[1:], reduction="none")
    right = (logits.argmax(-1) == part.ids[1:]) & (part.weights[1:] > 0)
    return (losses * part.weights[1:]).sum(), right.sum()


def _separate_loss(model: Any, parts: list[Conversation]) -> Tensor:
    return torch.stack([_alone(model, part)[0] for part in parts]).sum() / _num_labels(parts)


_curves: dict[tuple[str, str, int, bool, frozenset[int]], plain_loop.Curve] = {}


def conversation_steps(layout: str, precision: str, folder: Path) -> Report:
    """STEPS steps on conversations, packed with a document mask and else padded; and those of a
    plain loop that runs every conversation by itself."""
    engine = build(layout, precision, length=ROW)
    results = [_train_step(engine, step) for step in range(1, STEPS + 1)]
    skipped = frozenset(step for step, (_, norm) in enumerate(results, 1) if norm is None)
    rows, packed, kind = rows_per_step(engine), _is_packed(engine), model_type(layout)

    def loss_of(model: Any, step: int) -> Tensor:
        return _separate_loss(model, _flat(step_conversations(step, rows, packed)))

    key = (kind, precision, rows, packed, skipped)
    if key not in _curves:
        _curves[key] = plain_loop.train(_plain_model(layout, precision), loss_of, skipped, PEAK)
    return _curve_report(results, _curves[key])


def _plain_model(layout: str, precision: str) -> Any:
    weights = plain_weights(layout, precision)
    return plain_loop.plain_model(model_type(layout), weights, precision, ROW)


def _curve_report(results: list[tuple[float, float | None]], plain: plain_loop.Curve) -> Report:
    return {
        "losses": [loss for loss, _ in results],
        "norms": [norm for _, norm in results],
        "plain": vars(plain),
    }


def conversation_file(layout: str, precision: str, folder: Path) -> Report:
    """`conversation_steps` with the rows that this project's own reading, template, labels, packing
    and loading make of a file of conversations."""
    engine = build(layout, precision, length=ROW)
    data = chat_data(_request(folder / f"rank{dist.get_rank()}", _is_packed(engine)))
    accumulation = engine.options.training.accumulation_steps
    source = data.open_rows({})
    size = rows_per_step(engine)
    loader = BatchLoader(source, size, engine.dp_rank, engine.layout.dp, accumulation)
    results, samples = [], []
    for step in range(1, STEPS + 1):
        rows = loader.batch(step - 1)
        batches = [
            MicroBatch(
                *(
                    None if each is None else torch.from_numpy(each)
                    for each in (part.ids, part.labels, part.documents, part.weights)
                )
            )
            for part in rows.micro_batches
        ]
        results.append(_optimize(engine, step, batches, rows.num_labels))
        samples.append(rows.samples)
    known = conversations()

    def loss_of(model: Any, step: int) -> Tensor:
        found = data.passages(samples[step - 1], {})
        return _separate_loss(model, [known[each.number - 1] for row in found for each in row])

    plain = plain_loop.train(_plain_model(layout, precision), loss_of, peak=PEAK)
    return _curve_report(results, plain)


def _request(folder: Path, packing: bool) -> ChatRequest:
    """The sample as a user would give it, in a folder of this rank's own."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"messages": messages}) + "\n" for messages in records()]
    (folder / "chats.jsonl").write_text("".join(lines))
    chosen = copy.deepcopy(tokenizer())
    use_template(chosen, "chatml", {"conversation"})
    chosen.save_pretrained(folder / "tokenizer")
    return ChatRequest(
        datasets=[str(folder / "chats.jsonl")],
        tokenizer=str(folder / "tokenizer"),
        max_length=ROW,
        eval_ratio=0.0,
        cache_dir=folder / "cache",
        workers=1,
        other_role_weight=OTHER_WEIGHT,
        packing=packing,
    )


def conversation_scores(layout: str, precision: str, folder: Path) -> Report:
    """What a trained model makes of conversations padded, by themselves and, with a document mask,
    packed."""
    engine = build(layout, precision, length=ROW)
    for step in range(1, 11):  # until it is right about some tokens
        _train_step(engine, step)
    size = rows_per_step(engine)
    packed = step_conversations(99, size, packed=True)
    parts = _flat(packed)
    padded = [[part] for part in parts] + [[]] * (-len(parts) % size)
    report = {
        "padded": _scores(engine, padded, documents=False),
        "alone": _scores_alone(engine, layout, precision, parts),
    }
    if _is_packed(engine):
        report["packed"] = _scores(engine, packed, documents=True)
    return report


def _scores(
    engine: Engine, filled: list[list[Conversation]], documents: bool
) -> tuple[float, int, int]:
    """(loss sum, correct, labels), in batches of a training step's size."""
    size = rows_per_step(engine)
    scores = [
        engine.score(_batches(engine, in_rows(filled[first : first + size]), documents))
        for first in range(0, len(filled), size)
    ]
    return (
        sum(score.loss_sum for score in scores),
        sum(score.correct for score in scores),
        sum(score.labels for score in scores),
    )


def _scores_alone(
    engine: Engine, layout: str, precision: str, parts: list[Conversation]
) -> tuple[float, int, int]:
    weights = merged({name: tensor.detach().cpu() for name, tensor in gather_weights(engine)})
    model = plain_loop.plain_model(model_type(layout), weights, precision, ROW)
    with torch.no_grad():
        found = [_alone(model, part) for part in parts]
    labels = sum(int((part.weights[1:] > 0).sum()) for part in parts)
    return (
        sum(loss.item() for loss, _ in found),
        sum(int(correct) for _, correct in found),
        labels,
    )


CHECKS: dict[str, Callable[[str, str, Path], Report]] = {
    check.__name__: check for check in (conversation_steps, conversation_file, conversation_scores)
}
