"""Chunks on the host: shards change hands without a copy, and norms and overflows are found."""

import math

import pytest
import torch
import torch.distributed as dist

from llama_lib import host

ACTIVE = host.install()
if "gemini_tiers" not in ACTIVE:
    pytest.skip("this machine has an accelerator of its own", allow_module_level=True)

from colossalai.zero.gemini.chunk import chunk, manager  # noqa: E402
from colossalai.zero.gemini.chunk.chunk import TensorState  # noqa: E402

from llama_lib.host.gemini import DEVICE_TIER, HostChunk  # noqa: E402

HOST_TIER = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_process")


def closed_chunk(
    values: torch.Tensor, on_host_tier: bool = False, keep_gathered: bool = False
) -> tuple[HostChunk, torch.Tensor]:
    """A chunk twice the size of its only tensor, and that tensor."""
    built = HostChunk(
        2 * values.numel(),
        dist.group.WORLD,
        values.dtype,
        cpu_shard_init=on_host_tier,
        keep_gathered=keep_gathered,
        pin_memory=True,
    )
    tensor = values.clone()
    built.append_tensor(tensor)
    built.close_chunk()
    return built, tensor


def test_colossalai_builds_host_chunks():
    assert chunk.Chunk is manager.Chunk is HostChunk


@pytest.mark.parametrize("on_host_tier", [False, True])
def test_gathering_and_moving_share_one_memory(on_host_tier):
    values = torch.arange(10.0)
    chunk, tensor = closed_chunk(values, on_host_tier)
    assert chunk.device_type == ("cpu" if on_host_tier else "cuda")
    address = chunk.payload.data_ptr()
    for _ in range(2):
        chunk.shard_move(DEVICE_TIER)
        assert (chunk.device_type, chunk.memory_usage) == ("cuda", {"cuda": 80, "cpu": 0})
        chunk.access_chunk()
        assert torch.equal(tensor, values)
        assert tensor.data_ptr() == address
        chunk.release_chunk()
        chunk.shard_move(HOST_TIER)
        assert (chunk.device_type, chunk.memory_usage) == ("cpu", {"cuda": 0, "cpu": 80})
        assert chunk.payload.data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_come_from_the_master_into_their_own_memory(dtype):
    """In fp32 a shared buffer would let the gradients overwrite the master weights."""
    working, _ = closed_chunk(torch.zeros(10, dtype=dtype), on_host_tier=True)
    master, _ = closed_chunk(torch.arange(10.0), on_host_tier=True)
    master.init_pair(working)
    working.optim_update()
    working.shard_move(DEVICE_TIER)
    assert torch.equal(working.payload[:10].float(), torch.arange(10.0))
    working.payload.zero_()
    assert torch.equal(master.payload[:10], torch.arange(10.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("keep_gathered", [False, True])
def test_norm_is_exact_over_many_elements(dtype, keep_gathered):
    values = torch.randn(2**23, generator=torch.Generator().manual_seed(0)).to(dtype)
    chunk, _ = closed_chunk(values, keep_gathered=keep_gathered)
    chunk.set_l2_norm()
    assert math.sqrt(chunk.l2_norm) == pytest.approx(values.double().norm().item(), rel=1e-5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_overflow_is_found(bad):
    values = torch.full((100,), 60000.0, dtype=torch.float16)
    assert not closed_chunk(values)[0].has_inf_or_nan
    values[57] = bad
    assert closed_chunk(values)[0].has_inf_or_nan


def test_a_chunk_follows_colossalai_state_machine():
    chunk, tensor = closed_chunk(torch.arange(4.0))
    chunk.access_chunk()
    for state in (
        TensorState.COMPUTE,
        TensorState.HOLD_AFTER_BWD,
        TensorState.READY_FOR_REDUCE,
    ):
        chunk.tensor_trans_state(tensor, state)
    chunk.copy_tensor_to_chunk_slice(tensor, torch.full((4,), 3.0))
    assert chunk.can_reduce
    chunk.reduce()
    assert not chunk.is_gathered
    assert torch.equal(chunk.payload[:4], torch.full((4,), 3.0))
