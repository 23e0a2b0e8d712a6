"""The output head and the loss together, a piece of the tokens at a time.

Invariant: logits exist for CHUNK_ELEMENTS numbers at once, never for all tokens; on a CPU what is
made of them in fp32 for BLOCK_ELEMENTS. Loss and gradients are those of `criterion.token_losses` on
all tokens. The gradients are made in the forward pass, where the logits are, so nothing is computed
twice.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_unary

from llama_lib.criterion import IGNORED, token_losses
from llama_lib.planner.job import CHUNK_ELEMENTS

# Numbers that a CPU turns into fp32 at once: 1 MiB of them stay in a core's cache from one pass to
# the next. Measured on two cores; between 2**17 and 2**21 the step takes the same time.
BLOCK_ELEMENTS = 2**18

# What the head is asked for: from the hidden states [rows, length, hidden] and its weight.
Task = Callable[[Tensor, Tensor], Tensor]


class ChunkedHead:
    """Stands in a model's output head and, when asked, gives a loss instead of logits.

    The loss then comes out of the model where its logits would: only in there do the plugins have
    the head's weight in one piece, and see the operation that needs it.
    """

    def __init__(self, head: nn.Linear, vocab_size: int) -> None:
        """
        Args:
            vocab_size: ids of the whole vocabulary; further rows of the weight are padding.
        """
        self._head, self._vocab_size = head, vocab_size
        self._logits = head.forward
        self._task: Task | None = None
        head.forward = self._forward  # type: ignore[method-assign, assignment]

    @contextlib.contextmanager
    def asked_for(self, task: Task) -> Iterator[None]:
        """In the block the model's `logits` are what `task` makes of the hidden states."""
        self._task = task
        try:
            yield
        finally:
            self._task = None

    def _forward(self, hidden: Tensor) -> Tensor:
        if self._task is None:
            return self._logits(hidden)
        weight = self._head.weight
        if weight.shape[0] > self._vocab_size:
            weight = weight[: self._vocab_size]
        return _applied(hidden, weight, self._task)


def _applied(hidden: Tensor, weight: Tensor, task: Task) -> Tensor:
    """`task(hidden, weight)`, as one operation of torch: gemini gathers the weight around those."""
    if has_torch_function_unary(weight):
        return handle_torch_function(_applied, (weight,), hidden, weight, task)
    return task(hidden, weight)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    counts: Tensor | float = 1.0,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """Sum of the token losses in fp32, each times its count.

    Args:
        hidden: [rows, length, hidden size].
        weight: [vocabulary, hidden size].
        targets: [rows, length], the id each position has to predict; -100: none.
        counts: fp32 [rows, length] what each loss counts.
        scale: about what the result's gradient will be. In fp16 the gradients of the logits are
            rounded at this scale, as they would be without chunks.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, counts, scale)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        counts: Tensor | float,
        scale: Tensor | float,
    ) -> Tensor:
        states, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        factors = (targets != IGNORED).float()
        if isinstance(counts, Tensor):
            factors *= counts.reshape(-1)
        wants_states, wants_weight = ctx.needs_input_grad[:2]
        sums = torch.zeros((), device=hidden.device)
        rows = _rows(CHUNK_ELEMENTS, weight)
        pieces = len(range(0, len(states), rows))
        state_gradient = torch.empty_like(states) if wants_states else None
        # One product alone is rounded once, as without chunks; more are added in fp32.
        total = None
        for first in range(0, len(states), rows):
            part = slice(first, first + rows)
            logits = states[part] @ weight.t()
            sums += _losses(logits, targets[part], factors[part], scale)
            if state_gradient is not None:
                torch.mm(logits, weight, out=state_gradient[part])
            if wants_weight:
                product = logits.t() @ states[part]
                total = _added(total, product, pieces)
        ctx.scale = scale
        ctx.shape = hidden.shape
        ctx.save_for_backward(state_gradient, total)
        ctx.dtype = weight.dtype
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        state_gradient, total = ctx.saved_tensors
        # Without axes: ColossalAI's loss scale has one, and fp16 times that would be fp32.
        ratio = (gradients[0] / ctx.scale).reshape(())
        if state_gradient is not None:
            state_gradient = (state_gradient * ratio).view(ctx.shape)
        if total is not None:
            total = (total * ratio).to(ctx.dtype)
        return state_gradient, total, None, None, None


def _rows(elements: int, weight: Tensor) -> int:
    return max(1, elements // weight.shape[0])


def _added(total: Tensor | None, product: Tensor, pieces: int) -> Tensor:
    if total is None:
        return product if pieces == 1 else product.float()
    return total.add_(product)


def _blocks(logits: Tensor) -> list[slice]:
    """Tokens whose logits are turned into fp32 at once: on a CPU few, on a GPU all of a piece."""
    rows = tokens = logits.shape[0]
    if logits.device.type == "cpu":
        rows = max(1, BLOCK_ELEMENTS // logits.shape[1])
    return [slice(first, first + rows) for first in range(0, tokens, rows)]


def _losses(logits: Tensor, targets: Tensor, factors: Tensor, scale: Tensor | float) -> Tensor:
    """Sum of the losses; `logits` [tokens, vocabulary] become their own gradients times `scale`."""
    sums = torch.zeros((), device=logits.device)
    columns = targets.clamp(min=0)[:, None]
    for part in _blocks(logits):
        block = logits[part].log_softmax(-1, dtype=torch.float32)
        column, factor = columns[part], factors[part, None]
        sums -= (block.gather(-1, column) * factor).sum()
        # (softmax - one-hot) times what the loss counts
        factor = factor * scale
        block = block.exp_().mul_(factor)
        block.scatter_add_(-1, column, -factor)
        logits[part] = block
    return sums


def linear_score(hidden: Tensor, weight: Tensor, targets: Tensor, counts: Tensor | float) -> Tensor:
    """[sum of losses, targets that are the likeliest token, targets] in fp64, without gradients.

    Arguments as those of `linear_cross_entropy`.
    """
    states, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    factors = counts.reshape(-1) if isinstance(counts, Tensor) else states.new_ones(len(states))
    sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
    rows = _rows(CHUNK_ELEMENTS, weight)
    for first in range(0, len(states), rows):
        part = slice(first, first + rows)
        logits, target, factor = states[part] @ weight.t(), targets[part], factors[part]
        for block in _blocks(logits):
            losses = token_losses(logits[block], target[block]) * factor[block]
            right = (logits[block].argmax(-1) == target[block]).sum()  # no id is -100
            labels = (target[block] != IGNORED).sum()
            sums += torch.stack([losses.sum().double(), right, labels])
    return sums
