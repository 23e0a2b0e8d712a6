"""Next-token losses and guesses from a model's logits, whole or cut by tp or all_to_all.

Invariant: a token's loss is fp32 whatever the logits are, and the same however the vocabulary is
cut; tokens without a label have loss 0 and no gradient.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llama_lib.layout import Layout
from llama_lib.models import padded_vocabulary

IGNORED = -100


class Criterion:
    """What the logits of one layout say of the labels.

    In its methods `logits` are [rows, length, vocabulary], under tp this rank's part of the
    vocabulary, under all_to_all this rank's part of the length; `labels` [rows, length] whole,
    position i's label being `labels[i + 1]`, -100 for none; `weights` fp32 [rows, length] what the
    label in the same place counts, None: one each. A label of weight 0 is none.
    """

    def __init__(self, layout: Layout, plugin: Any, vocab_size: int) -> None:
        """
        Args:
            plugin: the Booster plugin, for its process groups.
            vocab_size: ids of the whole vocabulary, before ColossalAI pads it.
        """
        self.tp, self.sequence_axis = layout.tp, layout.sequence_axis
        self.vocab_size = vocab_size
        if self.tp > 1:
            self.tp_group = plugin.tp_group
            # Ids of each tensor-parallel rank but the last, which leaves out the padding.
            self.part = padded_vocabulary(vocab_size, self.tp) // self.tp
            self.first_id = dist.get_rank(self.tp_group) * self.part
        if self.sequence_axis > 1:
            self.sequence_part = dist.get_rank(plugin.sp_group)

    def loss_sum(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum of the token losses in fp32, each times its weight."""
        targets, counts = self.targets(logits.device, labels, weights)
        return (self._token_losses(logits, targets) * counts).sum()

    def score(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """[`loss_sum`, labels that are the likeliest token, labels] in fp64."""
        targets, counts = self.targets(logits.device, labels, weights)
        loss = (self._token_losses(logits, targets) * counts).sum()
        correct = (self._guesses(logits) == targets).sum()  # no id is -100
        return torch.stack([loss.double(), correct.double(), (targets != IGNORED).sum().double()])

    def whole_vocabulary(self, row: Tensor) -> Tensor:
        """The logits of one position, [vocabulary], from every tensor-parallel rank's part."""
        row = F.pad(row, (0, self.part - row.shape[0]))
        parts = [torch.empty_like(row) for _ in range(self.tp)]
        dist.all_gather(parts, row.contiguous(), group=self.tp_group)
        return torch.cat(parts)[: self.vocab_size]

    def targets(
        self, device: torch.device, labels: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor | float]:
        """What each of the logits' positions predicts (-100: nothing), and what that counts."""
        targets = self._next(labels.to(device), IGNORED)
        if weights is None:
            return targets, 1.0
        counts = self._next(weights.to(device), 0.0)
        return targets.masked_fill(counts == 0.0, IGNORED), counts

    def _next(self, values: Tensor, last: float) -> Tensor:
        values = F.pad(values[:, 1:], (0, 1), value=last)
        if self.sequence_axis == 1:
            return values
        return values.chunk(self.sequence_axis, dim=1)[self.sequence_part]

    def _token_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.tp == 1:
            return token_losses(logits, targets)
        return sharded_token_losses(logits, targets, self.first_id, self.tp_group)

    def _guesses(self, logits: Tensor) -> Tensor:
        if self.tp == 1:
            return logits.argmax(-1)
        return sharded_argmax(logits, self.first_id, self.tp_group)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of every token, fp32 [rows, length].

    Args:
        logits: [rows, length, vocabulary].
        targets: [rows, length], the id each position has to predict; -100: none.
    """
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        targets.reshape(-1),
        ignore_index=IGNORED,
        reduction="none",
    )
    return losses.view(targets.shape)


def sharded_token_losses(logits: Tensor, targets: Tensor, first: int, group: Any) -> Tensor:
    """`token_losses` where every rank of `group` has a part of the vocabulary.

    ColossalAI's cross_entropy_1d has sums and means only, which leave no room for weights.

    Args:
        logits: [rows, length, part of the vocabulary]; the part may be narrower on the last rank.
        first: the id of the part's first column.
    """
    return _ShardedCrossEntropy.apply(logits.float(), targets, first, group)


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, group: Any) -> Tensor:
        largest = logits.detach().amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        shifted = logits - largest[..., None]
        mine = (targets >= first) & (targets < first + logits.shape[-1])
        column = (targets - first).masked_fill(~mine, 0)[..., None]
        chosen = shifted.gather(-1, column).squeeze(-1).masked_fill(~mine, 0.0)
        dist.all_reduce(chosen, group=group)
        exponentials = shifted.exp_()
        total = exponentials.sum(-1)
        dist.all_reduce(total, group=group)
        unlabelled = targets == IGNORED
        if ctx.needs_input_grad[0]:
            # softmax - one-hot, in the memory of the exponentials
            gradient = exponentials.div_(total[..., None])
            gradient.scatter_add_(-1, column, -mine.to(gradient.dtype)[..., None])
            ctx.save_for_backward(gradient.masked_fill_(unlabelled[..., None], 0.0))
        return (total.log() - chosen).masked_fill(unlabelled, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][..., None], None, None, None


def sharded_argmax(logits: Tensor, first: int, group: Any) -> Tensor:
    """`argmax` over the vocabulary of `sharded_token_losses`; of equal logits the first, as torch.

    Returns:
        Ids [rows, length], equal on every rank of `group`.
    """
    largest, column = logits.max(-1)
    everywhere = largest.clone()
    dist.all_reduce(everywhere, dist.ReduceOp.MAX, group=group)
    beyond = torch.iinfo(torch.int64).max
    ids = (column + first).masked_fill(largest < everywhere, beyond)
    dist.all_reduce(ids, dist.ReduceOp.MIN, group=group)
    return ids
