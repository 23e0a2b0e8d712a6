"""The host accelerator does on a CPU what ColossalAI asks of CUDA."""

import pytest
import torch

from llama_lib import host

ACTIVE = host.install()
if "host_accelerator" not in ACTIVE:
    pytest.skip("this machine has an accelerator of its own", allow_module_level=True)

from colossalai.accelerator import get_accelerator  # noqa: E402
from colossalai.shardformer.layer.utils import Randomizer  # noqa: E402

from llama_lib.host.accelerator import HostAccelerator  # noqa: E402
from llama_lib.host.gemini import DEVICE_TIER, GeminiAccelerator  # noqa: E402


def test_colossalai_uses_it_and_reaches_gloo():
    accelerator = get_accelerator()
    assert isinstance(accelerator, HostAccelerator)
    assert accelerator.communication_backend == "gloo"
    assert torch.empty(1, device=accelerator.current_device()).device.type == "cpu"


def test_random_state_can_be_saved_and_restored():
    accelerator = get_accelerator()
    accelerator.manual_seed(3)
    state = accelerator.get_rng_state()
    first = torch.rand(4)
    accelerator.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


def test_colossalai_randomizer_leaves_the_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    randomizer = Randomizer(seed=9)
    with randomizer.fork_rng():
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)


def test_streams_are_in_program_order():
    accelerator = get_accelerator()
    stream = accelerator.Stream()
    stream.wait_stream(accelerator.current_stream())
    with accelerator.stream(stream):
        value = torch.ones(1)
    accelerator.synchronize()
    assert value.item() == 1
    with accelerator.stream(None):
        pass


def test_memory_is_resident_bytes():
    accelerator = get_accelerator()
    before = accelerator.memory_allocated()
    held = torch.ones(2**24)
    grown = accelerator.memory_allocated() - before
    assert 0.8 * held.nbytes < grown < 1.5 * held.nbytes
    assert accelerator.max_memory_allocated() >= accelerator.memory_allocated() * 0.9


def test_only_gemini_sees_two_tiers():
    """`tensor.to("cpu:0")` copies, so nobody but Gemini's placement may get that answer."""
    assert get_accelerator().get_current_device() == torch.device("cpu")
    assert GeminiAccelerator().get_current_device() == DEVICE_TIER != torch.device("cpu")
