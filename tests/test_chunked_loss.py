"""Loss and gradients in pieces are those of all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_lib import chunked_loss
from llama_lib.chunked_loss import ChunkedHead, linear_cross_entropy, linear_score
from llama_lib.criterion import IGNORED

ROWS, LENGTH, HIDDEN, VOCABULARY = 3, 17, 24, 101


@pytest.fixture(params=[1, 7, 51, 2**20], ids="{}_tokens".format)
def pieces(request, monkeypatch):
    """Tokens that go through the head at once; 51 are all of them."""
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", request.param * VOCABULARY)
    monkeypatch.setattr(chunked_loss, "BLOCK_ELEMENTS", 5 * VOCABULARY)


def example(dtype=torch.float32, *, ignored=0.3):
    """hidden, weight, targets; about 0.3 of the targets are none."""
    torch.manual_seed(3)
    hidden = torch.randn(ROWS, LENGTH, HIDDEN).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN) / 4).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    targets[torch.rand(ROWS, LENGTH) < ignored] = IGNORED
    return hidden, weight, targets


def at_once(hidden, weight, targets, counts=1.0):
    logits = (hidden @ weight.t()).float()
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return (losses.view(targets.shape) * counts).sum()


def gradients(loss, factor, *leaves):
    return torch.autograd.grad(loss * factor, leaves)


@pytest.mark.parametrize("weighted", [False, True])
def test_fp32_loss_and_gradients_equal_those_of_torch(pieces, weighted):
    hidden, weight, targets = example()
    counts = torch.rand(ROWS, LENGTH) if weighted else 1.0
    expected = at_once(hidden, weight, targets, counts)
    found = linear_cross_entropy(hidden, weight, targets, counts)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    pairs = zip(
        gradients(found, 0.125, hidden, weight),
        gradients(expected, 0.125, hidden, weight),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp32_as_torch_is(pieces, dtype):
    hidden, weight, targets = example(dtype)
    exact = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    reference = gradients(at_once(*exact, targets), 1.0, *exact)
    usual = gradients(at_once(hidden, weight, targets), 1.0, hidden, weight)
    found = gradients(linear_cross_entropy(hidden, weight, targets), 1.0, hidden, weight)
    for one, other, true in zip(found, usual, reference, strict=True):
        assert one.dtype == dtype
        assert (one.float() - true).norm() < 1.5 * (other.float() - true).norm()


def test_fp16_gradients_are_rounded_at_the_scale_of_the_loss(monkeypatch):
    """Divided by millions of labels before the loss scale, they would all be zero in fp16."""
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", 7 * VOCABULARY)
    hidden, weight, targets = example(torch.float16)
    labels, loss_scale = 4e6, torch.tensor([2.0**16])  # one axis, as ColossalAI's
    scale = loss_scale / labels
    usual = gradients(at_once(hidden, weight, targets), scale.item(), hidden, weight)
    with LargestOfType(torch.float32) as made:
        loss = linear_cross_entropy(hidden, weight, targets, scale=scale)
        found = gradients(loss, scale.item(), hidden, weight)
    assert made.elements <= max(7 * VOCABULARY, weight.numel()), "an fp32 copy of all gradients"
    for one, other in zip(found, usual, strict=True):
        assert one.count_nonzero() > 0.99 * other.count_nonzero() > 0
        assert (one.float() - other.float()).norm() < 5e-3 * other.float().norm()


def test_a_frozen_head_gets_no_gradient(pieces):
    hidden, weight, targets = example()
    expected = gradients(at_once(hidden, weight, targets), 1.0, hidden)
    weight.requires_grad_(False)
    loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(gradients(loss, 1.0, hidden), expected, rtol=1e-5, atol=1e-7)


def test_rows_without_any_target_cost_nothing_and_move_nothing(pieces):
    hidden, weight, targets = example(ignored=2.0)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.item() == 0.0
    assert all(not g.any() for g in gradients(loss, 1.0, hidden, weight))


class LargestOfType(TorchDispatchMode):
    """The most elements that a tensor of `dtype` made inside had."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.elements = dtype, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == self.dtype:
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 4)
        return result


def test_full_fp32_logits_never_exist(monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", 7 * VOCABULARY)
    hidden, weight, targets = example(torch.bfloat16)
    with LargestOfType(torch.float32) as usual:
        at_once(hidden, weight, targets).backward()
    with LargestOfType(torch.float32) as found:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert usual.elements == ROWS * LENGTH * VOCABULARY
    assert found.elements <= max(7 * VOCABULARY, weight.numel())


def test_the_score_counts_the_likeliest_tokens(pieces):
    hidden, weight, targets = example()
    counts = torch.rand(ROWS, LENGTH)
    logits = hidden @ weight.t()
    targets[0, :5] = logits.argmax(-1)[0, :5]
    with torch.no_grad():
        found = linear_score(hidden, weight, targets, counts).tolist()
    assert found[0] == pytest.approx(at_once(hidden, weight, targets, counts).item(), rel=1e-6)
    assert found[1:] == [(logits.argmax(-1) == targets).sum(), (targets != IGNORED).sum()]


class Plain(torch.nn.Module):
    """A model that is nothing but its head."""

    def __init__(self, rows):
        super().__init__()
        self.lm_head = torch.nn.Linear(HIDDEN, rows, bias=False)

    def forward(self, hidden):
        return self.lm_head(hidden)


def test_the_head_gives_logits_again_when_it_is_not_asked():
    hidden, _, targets = example()
    model = Plain(VOCABULARY)
    logits = model(hidden)
    head = ChunkedHead(model.lm_head, VOCABULARY)
    with head.asked_for(lambda states, weight: linear_cross_entropy(states, weight, targets)):
        loss = model(hidden)
    expected = at_once(hidden, model.lm_head.weight, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert torch.equal(model(hidden), logits)
    with pytest.raises(ZeroDivisionError), head.asked_for(lambda states, weight: 1 // 0):
        model(hidden)
    assert torch.equal(model(hidden), logits), "an error left the head asked"


def test_padding_of_the_vocabulary_has_no_part_in_the_loss():
    hidden, weight, targets = example()
    model = Plain(VOCABULARY + 27)
    with torch.no_grad():
        model.lm_head.weight[:VOCABULARY] = weight
        model.lm_head.weight[VOCABULARY:] = 9.0
    head = ChunkedHead(model.lm_head, VOCABULARY)
    with head.asked_for(lambda states, rows: linear_cross_entropy(states, rows, targets)):
        loss = model(hidden)
    torch.testing.assert_close(loss, at_once(hidden, weight, targets), rtol=1e-6, atol=0)
    loss.backward()
    assert not model.lm_head.weight.grad[VOCABULARY:].any()
