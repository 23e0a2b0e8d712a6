"""--kernels and --compile in transformers' own models: equal numbers, and what is refused.

Liger's kernels need an NVIDIA GPU. What can be tested without one is how they are put in place: a
stand-in has the signatures of liger_kernel 0.8, its arithmetic written with torch, and its habit of
rotating queries and keys in their own memory.
"""

import copy
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llama_lib import model_kernels, option_checks
from llama_lib.config import Options, parse_options
from llama_lib.layout import Layout, layout_of
from llama_lib.model_kernels import compile_layers, has_liger, use_kernels
from llama_lib.option_checks import compile_problems, kernel_problems
from llama_lib.recompute import use_recompute

SHAPE: dict[str, Any] = {
    "vocab_size": 72,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "use_cache": False,
    "attn_implementation": "sdpa",
}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ZERO2 = Layout("zero2", 1)


def model(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    config, model_class = KINDS[kind]
    torch.manual_seed(1)
    return model_class(config(**SHAPE)).to(dtype).train()


def outcome(built: Any, device: torch.device = CPU) -> tuple[float, list[Tensor]]:
    ids = torch.arange(48, device=device).reshape(2, 24) % SHAPE["vocab_size"]
    loss = built(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), [parameter.grad for parameter in built.parameters()]


def farthest(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((f - e).norm() / e.norm()) for f, e in pairs)


# -- a stand-in for Liger --------------------------------------------------------------------------


class StandInRMSNorm(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x, weight, eps, offset, casting_mode, in_place):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        StandInRMSNorm.calls += 1
        # A kernel reads memory: no hook on a weight is asked.
        with torch._C.DisableTorchFunction():
            inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
            ctx.save_for_backward(x, weight, inverse)
            return weight * (x * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, inverse = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            normalised = x * inverse
            inner = gradient * weight
            mean = (inner * normalised).mean(-1, keepdim=True)
            of_weight = (gradient * normalised).flatten(0, -2).sum(0)
            of_x = (inner - normalised * mean) * inverse
            return of_x.to(x.dtype), of_weight.to(weight.dtype), None, None, None, None


class StandInRope(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        StandInRope.calls += 1
        ctx.save_for_backward(cos, sin)
        for states, rotated in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
            states.data.copy_(rotated)
        return q.view_as(q), k.view_as(k)

    @staticmethod
    def backward(ctx, of_q, of_k):
        cos, sin = ctx.saved_tensors
        return *apply_rotary_pos_emb(of_q, of_k, cos, -sin), None, None


class StandInSiLUMul(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, gate, up):
        StandInSiLUMul.calls += 1
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        of_silu = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_silu, gradient * torch.nn.functional.silu(gate)


STAND_INS = {
    "rms_norm": {"LigerRMSNormFunction": StandInRMSNorm},
    "rope": {"LigerRopeFunction": StandInRope},
    "swiglu": {"LigerSiLUMulFunction": StandInSiLUMul},
}


@contextmanager
def liger_stand_in() -> Iterator[None]:
    """liger_kernel.ops as long as the block lasts."""
    modules = {"liger_kernel": {}, "liger_kernel.ops": {}}
    modules |= {f"liger_kernel.ops.{name}": names for name, names in STAND_INS.items()}
    with pytest.MonkeyPatch.context() as patch:
        for name, names in modules.items():
            module = types.ModuleType(name)
            vars(module).update(names)
            patch.setitem(sys.modules, name, module)
        patch.setattr(model_kernels, "has_liger", lambda: True)
        yield


# -- Liger -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("plugin", ["zero2", "gemini"])
@pytest.mark.parametrize("kind", KINDS)
def test_liger_changes_one_model_and_not_its_numbers(kind, plugin, recompute):
    plain = model(kind)
    changed = copy.deepcopy(plain)
    use_recompute(changed, recompute)
    counts = [each.calls for each in (StandInRMSNorm, StandInRope, StandInSiLUMul)]
    with liger_stand_in():
        assert use_kernels(changed, "auto", CUDA, Layout(plugin, 1)) == "liger"
    loss, gradients = outcome(changed)
    done = [each.calls for each in (StandInRMSNorm, StandInRope, StandInSiLUMul)]
    layers, times = SHAPE["num_hidden_layers"], 1 if recompute == "none" else 2
    called = [after - before for after, before in zip(done, counts, strict=True)]
    # The norm before the head is in no layer.
    assert called == [2 * layers * times + 1, layers * times, layers * times]
    expected, exact = outcome(plain)
    assert [each.calls for each in (StandInRMSNorm, StandInRope, StandInSiLUMul)] == done
    assert loss == pytest.approx(expected, rel=1e-6)
    assert farthest(gradients, exact) < 1e-5
    # The same parameters under the same names: checkpoints do not notice.
    assert changed.state_dict().keys() == plain.state_dict().keys()
    assert modeling_llama.apply_rotary_pos_emb is apply_rotary_pos_emb


def test_auto_takes_liger_only_where_it_runs(monkeypatch):
    monkeypatch.setattr(model_kernels, "has_liger", lambda: False)
    untouched = model()
    before = [module.__dict__.get("forward") for module in untouched.modules()]
    for device, compiled, chosen in [
        (CPU, False, "torch"),
        (CUDA, False, "torch (liger_kernel is not installed)"),
        (CUDA, True, "torch (compiled)"),
    ]:
        assert use_kernels(untouched, "auto", device, ZERO2, compiled=compiled) == chosen
    assert use_kernels(untouched, "torch", CUDA, ZERO2) == "torch"
    assert [module.__dict__.get("forward") for module in untouched.modules()] == before
    with liger_stand_in():
        split = Layout("hybrid_parallel", 2, tp=2, sp=2, sp_mode="split_gather")
        assert use_kernels(model(), "liger", CUDA, split) == "liger (rotary: torch)"
        flash = use_kernels(model(), "liger", CUDA, Layout("hybrid_parallel", 1), flash=True)
        assert flash == "liger (rotary: torch)"


def options_of(flags: str) -> Options:
    return parse_options("pretrain", f"-d unused {flags}".split())


def kernels_refused(flags: str, has_gpu: bool) -> list[str]:
    return kernel_problems(options_of(flags), has_gpu)


def compiling_refused(flags: str) -> list[str]:
    options = options_of(flags)
    return compile_problems(options, layout_of(options, 2), has_gpu=False)


def test_a_typed_liger_is_refused_where_it_cannot_run(monkeypatch):
    for flags in ("", "--kernels torch", "--kernels auto --compile"):
        assert kernels_refused(flags, False) == []
    (message,) = kernels_refused("--kernels liger", False)
    assert "needs an NVIDIA GPU" in message
    monkeypatch.setattr(option_checks.importlib.util, "find_spec", lambda name: None)
    (message,) = kernels_refused("--kernels liger", True)
    assert "pip install liger-kernel" in message
    monkeypatch.setattr(option_checks.importlib.util, "find_spec", lambda name: object())
    assert kernels_refused("--kernels liger", True) == []
    (message,) = kernels_refused("-p zero2 --kernels liger --compile", True)
    assert "--compile" in message


@pytest.mark.gpu
@pytest.mark.skipif(not has_liger(), reason="liger_kernel is not installed")
@pytest.mark.parametrize("plugin", ["zero2", "gemini"])
def test_liger_itself_on_a_gpu(plugin):
    plain = model().to(CUDA)
    changed = copy.deepcopy(plain)
    assert use_kernels(changed, "liger", CUDA, Layout(plugin, 1)) == "liger"
    loss, gradients = outcome(changed, CUDA)
    expected, exact = outcome(plain, CUDA)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert farthest(gradients, exact) < 1e-3


# -- torch.compile ---------------------------------------------------------------------------------


def test_compiled_layers_give_the_same_loss():
    """One compilation (half a minute) serves every layer, with and without recomputation."""
    from torch._dynamo.utils import counters

    expected, exact = outcome(model())
    torch._dynamo.reset()
    counters.clear()
    for recompute in ("none", "full"):
        compiled = model()
        use_recompute(compiled, recompute)
        compile_layers(compiled)
        loss, gradients = outcome(compiled)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert farthest(gradients, exact) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("-p gemini", "-p gemini"),
        ("-p gemini_auto", "-p gemini_auto"),
        ("-p hybrid_parallel --tp 2", "--tp above 1"),
        ("-p hybrid_parallel --sp 2 --sp_mode all_to_all", "--sp_mode"),
        ("-p zero2 --recompute selective", "--recompute selective"),
        ("-p zero2 -a", "-a is not tested"),
    ],
)
def test_compiling_is_refused(flags, named):
    (message,) = compiling_refused(f"--compile {flags}")
    assert named in message
    assert compiling_refused(flags) == []


def test_compiling_needs_a_compiler(monkeypatch):
    for flags in ("-p zero2", "-p zero2_cpu -g", "-p hybrid_parallel --pp 2 --document_mask"):
        assert compiling_refused(f"--compile {flags}") == []
    monkeypatch.setenv("CXX", "no-such-compiler")
    (message,) = compiling_refused("--compile -p zero2")
    assert "no-such-compiler" in message
