"""What every layout has to equal: a model of transformers and torch.optim.AdamW in one loop.

Invariant: nothing of ColossalAI and nothing of the engine takes part.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tests.distributed.cases import LEARNING_RATE, LENGTH, MODEL, STEPS, WARMUP

IGNORED = -100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Without a scale the gradients of a small model vanish in fp16; this one never overflows here.
FP16_SCALE = 2.0**8


@dataclass
class Curve:
    """Per step: loss before it, gradient norm before clipping (None: a skipped step)."""

    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)


def plain_config(model_type: str, length: int = LENGTH) -> PretrainedConfig:
    """The shape of `cases.MODEL`; Mistral's window is as long as a row, the most it may be."""
    window = {"sliding_window": length} if model_type == "mistral" else {}
    return AutoConfig.for_model(model_type, **MODEL, **window, use_cache=False)


def plain_model(
    model_type: str, weights: dict[str, Tensor], precision: str, length: int = LENGTH
) -> Any:
    model = AutoModelForCausalLM.from_config(plain_config(model_type, length))
    model = model.to(DTYPES[precision])
    # Rotary frequencies are fp32 in the model that transformers loads, whatever its precision.
    for module in model.modules():
        if hasattr(module, "rope_init_fn"):
            module.inv_freq = module.rope_init_fn(module.config, torch.device("cpu"))[0]
    model.load_state_dict(weights)
    return model


def batch(step: int, rows: int) -> tuple[Tensor, Tensor]:
    """(ids, labels) [rows, LENGTH] of a step: multiples of 31 in order, which is quickly learnt.

    Every row begins with its own number of tokens without a label, so rows, micro-batches and ranks
    weigh differently in the mean; the first row keeps a single label.
    """
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, 16, (rows, 1), generator=generator)
    ids = (starts + torch.arange(LENGTH)) % 16 * 31
    hidden = torch.randint(1, 3 * LENGTH // 4, (rows, 1), generator=generator)
    hidden[0] = LENGTH - 1
    return ids, ids.masked_fill(torch.arange(LENGTH) < hidden, IGNORED)


def packed_batch(step: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, labels, documents) [rows, LENGTH]: documents of random lengths, then padding.

    A document is `batch`'s multiples of 31 from a start of its own. Its first token has no label,
    padding has none, so rows, micro-batches and ranks weigh differently in the mean.
    """
    generator = torch.Generator().manual_seed(step)
    position = torch.arange(LENGTH)
    begins = torch.rand(rows, LENGTH, generator=generator) < 0.15
    begins[:, 0] = True
    begins[0, 1:] = position[1:] == 3  # the first row: three labels, then padding
    filled = torch.randint(LENGTH // 2, LENGTH + 1, (rows, 1), generator=generator)
    filled[0] = 5
    begins = torch.where(position < filled, begins, position == filled)
    documents = begins.cumsum(1) - 1
    starts = torch.randint(0, 16, (rows, LENGTH), generator=generator).gather(1, documents)
    padding = position >= filled
    ids = ((starts + position) % 16 * 31).masked_fill(padding, 0)
    return ids, ids.masked_fill(begins | padding, IGNORED), documents.int()


def document_inputs(documents: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What plain transformers is told of documents: a mask [rows, 1, length, length] and positions.

    Written pair by pair, as one would explain it.
    """
    rows, length = documents.shape
    mask = torch.full((rows, 1, length, length), torch.finfo(dtype).min, dtype=dtype)
    positions = torch.zeros(rows, length, dtype=torch.long)
    for row, numbers in enumerate(documents.tolist()):
        for query in range(length):
            seen = [key for key in range(query + 1) if numbers[key] == numbers[query]]
            mask[row, 0, query, seen] = 0
            positions[row, query] = len(seen) - 1
    return {"attention_mask": mask, "position_ids": positions}


def num_labels(labels: Tensor) -> int:
    return int((labels[:, 1:] != IGNORED).sum())


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )


def rate(step: int, peak: float) -> float:
    """Linear warm-up, then a cosine to a tenth at the last step."""
    if step <= WARMUP:
        return peak * step / WARMUP
    half_turn = math.pi * (step - WARMUP) / (STEPS - WARMUP)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(half_turn)))


def mean_loss(rows: int, with_documents: bool) -> Callable[[Any, int], Tensor]:
    """The loss of a model in a step of `rows` rows, of `packed_batch` or of `batch`."""

    def loss_of(model: Any, step: int) -> Tensor:
        inputs: dict[str, Tensor] = {}
        if with_documents:
            ids, labels, documents = packed_batch(step, rows)
            inputs = document_inputs(documents, model.dtype)
        else:
            ids, labels = batch(step, rows)
        logits = model(input_ids=ids, **inputs).logits
        return loss_sum(logits, labels) / num_labels(labels)

    return loss_of


def train(
    model: Any,
    loss_of: Callable[[Any, int], Tensor],
    skipped: frozenset[int] = frozenset(),
    peak: float = LEARNING_RATE,
) -> Curve:
    """STEPS steps, clipped to 1.0, decay 0.1 on matrices only.

    Below fp32: weights in that precision, masters and moments in fp32. The steps in `skipped`
    leave no trace but their loss.
    """
    scale = FP16_SCALE if model.dtype == torch.float16 else 1.0
    masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in masters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in masters if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    curve = Curve()
    for step in range(1, STEPS + 1):
        loss = loss_of(model, step)
        curve.losses.append(loss.item())
        if step in skipped:
            curve.norms.append(None)
            continue
        (loss * scale).backward()
        for master, weight in zip(masters, model.parameters(), strict=True):
            master.grad = weight.grad.float() / scale
            weight.grad = None
        curve.norms.append(torch.nn.utils.clip_grad_norm_(masters, 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = rate(step, peak)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, model.parameters(), strict=True):
                weight.copy_(master)
    return curve
