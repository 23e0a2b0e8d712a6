"""ZeRO on the host: norms and single processes take fewer copies and give the same numbers."""

import math

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig

from llama_lib import host

if "zero_alone" not in host.install():
    pytest.skip("this machine has an accelerator of its own", allow_module_level=True)

from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer

from llama_lib.config import parse_options
from llama_lib.engine import Engine, MicroBatch
from llama_lib.host import zero
from llama_lib.host.norms import NORM_BLOCK, squared_norm
from llama_lib.layout import layout_of

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, NORM_BLOCK, 3 * NORM_BLOCK + 7])
def test_a_norm_is_that_of_fp64(dtype, size):
    torch.manual_seed(0)
    tensor = torch.randn(size).to(dtype)
    expected = tensor.double().square().sum()
    torch.testing.assert_close(squared_norm(tensor), expected, rtol=1e-5, atol=0)


def test_the_norm_of_many_gradients_is_colossalais():
    gradients = [torch.randn(7, 5), torch.randn(NORM_BLOCK + 3).bfloat16()]
    for norm_type in (2, float("inf")):
        found = zero.compute_grad_norm(None, dist.group.WORLD, gradients, norm_type)
        expected = zero._compute_grad_norm(None, dist.group.WORLD, gradients, norm_type)
        assert found == pytest.approx(expected, rel=1e-5)
    assert zero.compute_grad_norm(None, dist.group.WORLD, []) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad):
    gradients = [torch.ones(5), torch.tensor([1.0, bad])]
    assert not math.isfinite(zero.compute_grad_norm(None, dist.group.WORLD, gradients))


def trained(flags: str, accumulation: int) -> tuple[list[float], list[torch.Tensor]]:
    """Gradient norms of four steps, and the weights after them."""
    options = parse_options("pretrain", f"-d unused -x bf16 -l 16 {flags}".split())
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    engine = Engine(options, layout_of(options, 1), config, torch.device("cpu"), accumulation)
    random = torch.Generator().manual_seed(5)
    norms = []
    for _ in range(4):
        rows = [torch.randint(90, (2, 16), generator=random) for _ in range(accumulation)]
        engine.forward_backward([MicroBatch(ids, ids) for ids in rows], 30 * accumulation)
        norms.append(engine.step().value)
    return norms, [parameter.detach().clone() for parameter in engine.module.parameters()]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("flags", ["-p zero2", "-p zero2_cpu", "-p hybrid_parallel --zero_stage 1"])
def test_a_process_alone_trains_as_with_buckets(monkeypatch, flags, accumulation):
    norms, weights = trained(flags, accumulation)
    with monkeypatch.context() as patch:
        patch.setattr(LowLevelZeroOptimizer, "_run_reduction", zero._run_reduction)
        norms_of_buckets, weights_of_buckets = trained(flags, accumulation)
    assert norms == norms_of_buckets
    pairs = zip(weights, weights_of_buckets, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_process_alone_copies_nothing_into_buckets(monkeypatch):
    def never(*_):
        raise AssertionError("flattened")

    from colossalai.zero.low_level.bookkeeping.bucket_store import BucketStore

    monkeypatch.setattr(BucketStore, "get_flatten_grad", never)
    norms, _ = trained("-p zero2", 1)
    assert all(norm > 0 for norm in norms)
