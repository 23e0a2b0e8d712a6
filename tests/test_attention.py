"""-a: what is handed to ColossalAI's kernel, with its SDPA extension run on the CPU."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_lib import attention, host
from llama_lib.errors import UserError

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
}


@pytest.fixture(autouse=True)
def _installed():
    host.install()


@pytest.fixture
def sdpa_kernel(monkeypatch):
    """ColossalAI's real SDPA extension, which itself is plain torch, as if it were available."""
    from colossalai.kernel.extensions.pybind.flash_attention import (
        FlashAttentionSdpaCudaExtension,
    )
    from colossalai.shardformer.layer import ColoAttention

    monkeypatch.setattr(FlashAttentionSdpaCudaExtension, "is_available", lambda self: True)
    assert attention.flash_kernel() == "flash_attention_sdpa_cuda"
    monkeypatch.setattr(ColoAttention, "_kernel_dispatch_map", None)


def test_equals_transformers_attention(sdpa_kernel):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).double().float()
    ids = torch.randint(0, 101, (2, 33))
    expected = model(ids).logits
    attention.use_flash_attention(model)
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)


def test_is_causal(sdpa_kernel):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    attention.use_flash_attention(model)
    ids = torch.randint(0, 101, (1, 20))
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 101
    assert torch.equal(model(ids).logits[:, :-1], model(changed).logits[:, :-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the kernel")
def test_refused_without_a_kernel():
    with pytest.raises(UserError, match=r"-a asks for .* none of .* runs here"):
        attention.flash_kernel()
