"""The Adam kernels that ColossalAI gets from llama_lib, against torch.optim.AdamW in fp32."""

from collections.abc import Callable

import pytest
import torch

from llama_lib import host
from llama_lib.errors import UserError

host.install()

from colossalai.kernel.kernel_loader import CPUAdamLoader  # noqa: E402
from colossalai.nn.optimizer import CPUAdam, FusedAdam, HybridAdam  # noqa: E402

from llama_lib.host import kernels  # noqa: E402

SHAPES = [(33, 7), (5,), (128, 64)]
STEPS = 5
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}
GRADIENT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def reference(
    gradients: list[list[torch.Tensor]], div_scale: float, decays: list[float]
) -> list[torch.Tensor]:
    """torch.optim.AdamW on fp32 gradients that were divided beforehand."""
    params = [param.requires_grad_() for param in tensors(0)]
    groups = [
        {"params": [param], "weight_decay": decay}
        for param, decay in zip(params, decays, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, fused=False, foreach=False, **SETTINGS)
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.float() / (div_scale if div_scale > 0 else 1)
        optimizer.step()
    return [param.detach() for param in params]


def gradients_of(dtype: torch.dtype, scale: float = 1.0) -> list[list[torch.Tensor]]:
    return [[(t * scale).to(dtype) for t in tensors(seed)] for seed in range(1, STEPS + 1)]


def train(
    build: Callable[[list[dict]], torch.optim.Optimizer],
    gradients: list[list[torch.Tensor]],
    decays: list[float],
    **step_arguments: float,
) -> list[torch.Tensor]:
    # As Gemini does: the parameter is made in the gradients' dtype, then its data is exchanged.
    masters = tensors(0)
    params = [torch.nn.Parameter(torch.empty(0)) for _ in masters]
    groups = [
        {"params": [param], "weight_decay": decay}
        for param, decay in zip(params, decays, strict=True)
    ]
    optimizer = build(groups)
    for step in gradients:
        for param, master, gradient in zip(params, masters, step, strict=True):
            param.data = gradient.clone()
            param.grad = param.data
            param.data = master
        optimizer.step(**step_arguments)
        optimizer.zero_grad()
    return masters


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("div_scale", [-1.0, 7.5])
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES)
def test_hybrid_adam_is_adamw_on_divided_gradients(dtype, div_scale):
    """As shipped, HybridAdam drops div_scale for bf16 gradients: gemini's clipping was off."""
    gradients = gradients_of(dtype, scale=max(div_scale, 1))
    decays = [0.1, 0.0, 0.3]
    found = train(
        lambda groups: HybridAdam(groups, **SETTINGS), gradients, decays, div_scale=div_scale
    )
    assert_same(found, reference(gradients, div_scale, decays))


def test_clipping_reaches_bf16_gradients():
    """The named regression: a step with div_scale 100 moves as if gradients were a hundredth."""
    gradients = gradients_of(torch.bfloat16)
    halves = [
        train(
            lambda groups: HybridAdam(groups, lr=1e-3, eps=1.0, betas=(0.9, 0.95)),
            gradients,
            [0.0, 0.0, 0.0],
            div_scale=scale,
        )
        for scale in (-1, 100)
    ]
    moved = [(a - b).abs().mean() for a, b in zip(halves[0], tensors(0), strict=True)]
    moved_clipped = [(a - b).abs().mean() for a, b in zip(halves[1], tensors(0), strict=True)]
    assert all(small < large / 20 for small, large in zip(moved_clipped, moved, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cpu_adam_loads_the_registered_kernel(dtype):
    gradients = gradients_of(dtype, scale=4)
    decays = [0.1, 0.0, 0.3]
    found = train(lambda groups: CPUAdam(groups, **SETTINGS), gradients, decays, div_scale=4.0)
    assert_same(found, reference(gradients, 4.0, decays))


@pytest.mark.parametrize("dtype", GRADIENT_DTYPES)
def test_multi_tensor_adam_keeps_colossalai_signature(dtype):
    """Called as HybridAdam calls the CUDA kernel; torch's kernel takes CPU tensors as well."""
    gradients = gradients_of(dtype, scale=3)
    params = tensors(0)
    exp_avgs = [torch.zeros_like(param) for param in params]
    exp_avg_sqs = [torch.zeros_like(param) for param in params]
    apply = kernels.FusedOptimizerModule().multi_tensor_adam
    for step, grads in enumerate(gradients, start=1):
        lists = [grads, params, exp_avgs, exp_avg_sqs]
        apply(65536, torch.zeros(1), lists, 3e-3, 0.9, 0.95, 1e-8, step, 1, 1, 0.1, 3.0)
    assert_same(params, reference(gradients, 3.0, [0.1] * 3))


def test_without_bias_correction_the_first_step_is_plain():
    param, grad = torch.zeros(4), torch.full((4,), 2.0)
    kernels.fused_adam(
        [param],
        [grad],
        [torch.zeros(4)],
        [torch.zeros(4)],
        step=1,
        lr=1.0,
        betas=(0.9, 0.99),
        eps=0.0,
        weight_decay=0.0,
        bias_correction=False,
    )
    # exp_avg = 0.1 * 2, exp_avg_sq = 0.01 * 4
    torch.testing.assert_close(param, torch.full((4,), -0.2 / 0.2))


def test_coupled_decay_is_torch_adam():
    gradients = gradients_of(torch.float32)
    params = [param.requires_grad_() for param in tensors(0)]
    expected = torch.optim.Adam(params, weight_decay=0.1, fused=False, foreach=False, **SETTINGS)
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.clone()
        expected.step()
    found = train(
        lambda groups: HybridAdam(groups, adamw_mode=False, **SETTINGS), gradients, [0.1] * 3
    )
    assert_same(found, [param.detach() for param in params])


def test_small_buckets_change_nothing(monkeypatch):
    gradients = gradients_of(torch.bfloat16)
    decays = [0.1] * 3
    whole = train(lambda groups: HybridAdam(groups, **SETTINGS), gradients, decays)
    monkeypatch.setattr(kernels, "BUCKET_ELEMENTS", 10)
    pieces = train(lambda groups: HybridAdam(groups, **SETTINGS), gradients, decays)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_parameters_may_join_later():
    """A parameter without a gradient at step 1 starts its own bias correction at step 2."""
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    twins = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    ours = HybridAdam([first, second], **SETTINGS)
    torchs = torch.optim.AdamW(twins, weight_decay=0, fused=False, foreach=False, **SETTINGS)
    for step in range(3):
        for index, (param, twin) in enumerate(zip((first, second), twins, strict=True)):
            if step >= index:
                param.grad = twin.grad = torch.full((3,), 0.5 + step)
        ours.step()
        torchs.step()
    assert_same([first.detach(), second.detach()], [twin.detach() for twin in twins])
    assert [ours.state[param]["step"] for param in (first, second)] == [3, 2]


def test_loading_the_kernel_is_silent(recwarn):
    assert CPUAdamLoader().load().CPUAdamOptimizer is kernels.TorchCpuAdam
    assert not [warning for warning in recwarn if "kernel" in str(warning.message)]


def test_other_cuda_kernels_are_refused_by_name():
    with pytest.raises(UserError, match="multi_tensor_lamb"):
        kernels.FusedOptimizerModule().multi_tensor_lamb  # noqa: B018


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("optimizer_class", [HybridAdam, FusedAdam])
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES)
def test_on_cuda(optimizer_class, dtype):
    params = [torch.nn.Parameter(t.cuda()) for t in tensors(0)]
    optimizer = optimizer_class(params, weight_decay=0.1, **SETTINGS)
    gradients = gradients_of(dtype, scale=4)
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            master = param.data
            param.data = gradient.cuda()
            param.grad = param.data
            param.data = master
        optimizer.step(div_scale=4.0)
    assert_same([param.detach().cpu() for param in params], reference(gradients, 4.0, [0.1] * 3))
