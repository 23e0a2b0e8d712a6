"""Losses and guesses from logits, against torch's cross entropy and argmax.

The ranks of a cut vocabulary are threads here and processes in tests/distributed/test_finetune.py.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from llama_lib.criterion import (
    IGNORED,
    Criterion,
    sharded_argmax,
    sharded_token_losses,
    token_losses,
)
from llama_lib.layout import Layout
from llama_lib.models import padded_vocabulary

ROWS, LENGTH, VOCABULARY = 3, 7, 11
WEIGHTS = (0.0, 0.25, 1.0)


def criterion() -> Criterion:
    return Criterion(Layout("zero2", 1), SimpleNamespace(), VOCABULARY)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(ROWS, LENGTH, VOCABULARY, requires_grad=True)


@pytest.fixture
def labels():
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels[0, :4] = IGNORED
    return labels


@pytest.fixture
def weights():
    chosen = torch.randint(3, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    return torch.tensor(WEIGHTS)[chosen]


# Two parts as ColossalAI cuts 11 ids: the last rank has less.
PARTS = (slice(0, 6), slice(6, VOCABULARY))


@pytest.fixture
def on_both_parts(monkeypatch) -> Callable:
    """Calls a function with each part's number in a thread of its own; they all-reduce together."""
    here, barrier, held = threading.local(), threading.Barrier(2, timeout=30), [None, None]

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
        held[here.number] = tensor.clone()
        barrier.wait()
        pair = torch.stack(held)
        barrier.wait()
        reduced = {dist.ReduceOp.SUM: pair.sum(0), dist.ReduceOp.MAX: pair.amax(0)}
        tensor.copy_({**reduced, dist.ReduceOp.MIN: pair.amin(0)}[op])

    monkeypatch.setattr(dist, "all_reduce", all_reduce)

    def call(function):
        def on_part(number):
            here.number = number
            return function(number)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(on_part, (0, 1)))

    return call


def pair_by_pair(logits, labels, weights):
    """The weighted loss as one would explain it: position i predicts label i + 1."""
    total = torch.zeros(())
    for row in range(ROWS):
        for position in range(LENGTH - 1):
            label, weight = labels[row, position + 1], weights[row, position + 1]
            if label != IGNORED:
                total = total - weight * logits[row, position].log_softmax(-1)[label]
    return total


def test_a_label_counts_with_the_weight_in_its_own_place(logits, labels, weights):
    expected = pair_by_pair(logits, labels, weights)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    found = criterion().loss_sum(logits, labels, weights)
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_without_weights_every_label_counts_one(logits, labels):
    expected = pair_by_pair(logits, labels, torch.ones(ROWS, LENGTH))
    torch.testing.assert_close(criterion().loss_sum(logits, labels), expected)
    torch.testing.assert_close(
        criterion().loss_sum(logits, labels, torch.ones(ROWS, LENGTH)), expected
    )


def test_a_label_of_weight_nothing_is_none(logits, labels):
    """Not even its NaN counts, as with -100."""
    weights = torch.ones(ROWS, LENGTH)
    weights[1, 3] = 0.0
    hidden = labels.clone()
    hidden[1, 3] = IGNORED
    broken = logits.detach().clone()
    broken[1, 2] = torch.nan
    expected = criterion().score(broken, hidden)
    assert expected.isfinite().all()
    assert torch.equal(criterion().score(broken, labels, weights), expected)


def test_the_score_counts_labels_and_right_guesses(logits, labels, weights):
    loss, correct, count = criterion().score(logits, labels, weights).tolist()
    guesses = logits.argmax(-1)[:, :-1]
    counted = (labels[:, 1:] != IGNORED) & (weights[:, 1:] > 0)
    assert loss == pytest.approx(pair_by_pair(logits, labels, weights).item())
    assert count == counted.sum()
    assert correct == ((guesses == labels[:, 1:]) & counted).sum() > 0


def test_half_precision_logits_have_fp32_losses(labels):
    logits = torch.randn(ROWS, LENGTH, VOCABULARY, dtype=torch.bfloat16)
    found = token_losses(logits, labels)
    assert found.dtype == torch.float32 and found.shape == labels.shape
    assert torch.equal(found, token_losses(logits.float(), labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cut_vocabulary_has_torchs_losses_and_gradient(on_both_parts, labels, dtype):
    logits = torch.randn(ROWS, LENGTH, VOCABULARY).mul(50).to(dtype)
    upstream = torch.rand(ROWS, LENGTH)

    def torchs(logits):
        losses = cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view(ROWS, LENGTH)

    def cut(logits, number):
        return sharded_token_losses(logits, labels, PARTS[number].start, None)

    def differentiated(losses_of, logits):
        logits = logits.detach().requires_grad_()
        losses = losses_of(logits)
        return losses.detach(), torch.autograd.grad(losses, logits, upstream)[0]

    def with_gradient(number):
        return differentiated(lambda part: cut(part, number), logits[..., PARTS[number]])

    expected, gradient = differentiated(torchs, logits)
    (first, first_gradient), (second, second_gradient) = on_both_parts(with_gradient)
    torch.testing.assert_close(first, expected)
    assert torch.equal(first, second)
    torch.testing.assert_close(torch.cat([first_gradient, second_gradient], -1), gradient)
    forward_only = on_both_parts(lambda number: cut(logits[..., PARTS[number]], number))
    assert torch.equal(forward_only[0], first)


def test_of_equal_logits_the_first_is_the_guess(on_both_parts):
    logits = torch.zeros(1, 4, VOCABULARY)
    logits[0, 0, [2, 3, 8]] = 1.0
    logits[0, 1, [7, 9]] = 1.0
    logits[0, 2, [5, 6]] = 1.0
    found = on_both_parts(
        lambda number: sharded_argmax(logits[..., PARTS[number]], PARTS[number].start, None)
    )
    assert (
        [ids.tolist() for ids in found] == 2 * [[[2, 7, 5, 0]]] == 2 * [logits.argmax(-1).tolist()]
    )


def test_padded_vocabulary_is_colossalais():
    assert padded_vocabulary(32000, 1) == 32000
    assert padded_vocabulary(32003, 2) == 32128
