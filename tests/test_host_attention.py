"""The CPU's bf16 attention: exact in fp64, causal, and as near to the truth in bf16 as eager is."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from llama_lib import host_attention
from llama_lib.host_attention import BLOCK, causal_attention, serves, use_host_attention
from llama_lib.recompute import use_recompute

# rows, heads, key-value heads, length, size: several blocks and less than one, a last one that is
# not full, grouped heads, and a size whose root is no power of two.
SHAPES = [
    (2, 4, 4, 2 * BLOCK, 16),
    (2, 6, 2, 24, 8),
    (1, 4, 1, BLOCK + 37, 24),
    (1, 2, 2, 1, 8),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value as attention gets them (transposed), and the gradient of the output."""
    rows, heads, shared, length, size = shape
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(rows, length, each, size, generator=generator).to(dtype).transpose(1, 2)
        for each in (heads, shared, shared, heads)
    ]


def with_gradients(attend, tensors: list[Tensor]) -> list[Tensor]:
    *leaves, gradient = (tensor.detach().clone() for tensor in tensors)
    for leaf in leaves:
        leaf.requires_grad_()
    output = attend(*leaves, leaves[0].shape[-1] ** -0.5)
    output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def of_torch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )


def eager(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """transformers' eager attention."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = torch.full((length, length), torch.finfo(query.dtype).min, dtype=query.dtype).triu(1)
    scores = query @ key.transpose(2, 3) * scale + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torchs_attention(shape):
    tensors = inputs(shape, torch.float64)
    for found, expected in zip(
        with_gradients(causal_attention, tensors), with_gradients(of_torch, tensors), strict=True
    ):
        # Gradients of keys and values add up in fp32.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_is_as_exact_in_bf16_as_transformers_is(shape):
    tensors = inputs(shape, torch.bfloat16)
    exact = with_gradients(of_torch, [tensor.double() for tensor in tensors])

    def errors(attend) -> list[float]:
        found = with_gradients(attend, tensors)
        return [
            float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)
        ]

    for ours, theirs in zip(errors(causal_attention), errors(eager), strict=True):
        assert ours < 1.3 * theirs
        assert ours < 1e-2


def test_a_token_sees_no_later_one():
    tensors = inputs((1, 2, 2, BLOCK + 8, 8), torch.bfloat16)[:3]
    before = causal_attention(*tensors, 0.3)
    for tensor in tensors[1:]:
        tensor[:, :, BLOCK + 2] += 1.0
    after = causal_attention(*tensors, 0.3)
    assert torch.equal(before[:, :, : BLOCK + 2], after[:, :, : BLOCK + 2])
    assert not torch.equal(before[:, :, BLOCK + 2 :], after[:, :, BLOCK + 2 :])


def test_torch_finds_no_fault_with_the_operation():
    """Fake tensors, aliasing and the registration of its gradient, as torch.compile needs them."""
    arguments = [tensor.requires_grad_() for tensor in inputs((1, 4, 2, 12, 8), torch.float32)[:3]]
    torch.library.opcheck(causal_attention, (*arguments, 0.3))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_model_that_uses_it(kind, recompute):
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[kind]
    config = config_class(
        vocab_size=72,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(1)
    plain = model_class(config).train()
    changed = copy.deepcopy(plain)
    use_host_attention(changed)
    use_recompute(changed, recompute)
    assert plain.config._attn_implementation == "sdpa"
    ids = torch.arange(48).reshape(2, 24)
    losses, flops = [], []
    for model in (plain, changed):
        with FlopCounterMode(display=False) as counter:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        losses.append(loss.item())
        flops.append(counter.get_total_flops())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for name, parameter in changed.named_parameters():
        expected = plain.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    # torch counts nothing for its own CPU kernel; ours is counted as eager attention would be.
    forward = 2 * 4 * 2 * 6 * 24 * 24 * 8
    if recompute != "full":
        assert flops[1] == flops[0] + 3 * forward


def test_who_is_served():
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    assert serves(LlamaConfig(), cpu, bf16, 4096)
    assert not serves(LlamaConfig(), cpu, torch.float32, 4096)
    assert not serves(LlamaConfig(), torch.device("cuda"), bf16, 4096)
    assert not serves(LlamaConfig(attention_dropout=0.1), cpu, bf16, 4096)
    assert serves(MistralConfig(sliding_window=64), cpu, bf16, 64)
    assert not serves(MistralConfig(sliding_window=64), cpu, bf16, 65)
    assert host_attention.NAME != "sdpa"
