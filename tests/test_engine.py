"""Building the model: lazy or not, weights depend on the seed and the parameter's name alone."""

import hashlib

import pytest
import torch
from transformers import LlamaConfig

from llama_lib import host
from llama_lib.engine import build_model, padded_vocabulary

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _installed():
    host.install()


def digest(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        data = parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
        total.update(name.encode() + data)
    return total.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lazy_weights_equal_eager_ones(dtype):
    from colossalai.lazy import LazyInitContext

    eager = build_model(LlamaConfig(**CONFIG), dtype, 7, CPU, lazy=False)
    lazy = LazyInitContext.materialize(build_model(LlamaConfig(**CONFIG), dtype, 7, CPU, lazy=True))
    assert {p.dtype for p in lazy.parameters()} == {dtype}
    assert digest(lazy) == digest(eager)


def test_seed_changes_every_matrix():
    one = build_model(LlamaConfig(**CONFIG), torch.float32, 1, CPU, lazy=False)
    two = build_model(LlamaConfig(**CONFIG), torch.float32, 2, CPU, lazy=False)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b) == (a.dim() < 2), name


def test_lazy_parameters_get_a_generator_of_the_device_they_will_be_on(monkeypatch):
    """A lazy parameter reports the CPU; a CPU generator would fail when it is made on a GPU."""
    devices = []
    real = torch.Generator

    def recorded(device="cpu"):
        devices.append(torch.device(device))
        return real()

    monkeypatch.setattr(torch, "Generator", recorded)
    build_model(LlamaConfig(**CONFIG), torch.float32, 1, torch.device("cuda", 0), lazy=True)
    assert set(devices) == {torch.device("cuda", 0)}


def test_padded_vocabulary_is_colossalais():
    assert padded_vocabulary(32000, 1) == 32000
    assert padded_vocabulary(32003, 2) == 32128
