"""Adam for ColossalAI from torch's fused kernels, on the CPU and on CUDA: nobody needs a compiler.

Invariant: the update equals torch.optim.AdamW on gradients divided by `div_scale`, whatever the
gradients' dtype, and gradients are never widened to fp32 for more than BUCKET_ELEMENTS at once.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Never

import torch
from colossalai.kernel.extensions.base_extension import _Extension
from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader

from llama_lib.errors import UserError

Tensors = list[torch.Tensor]

# Chosen: an fp32 copy of 64 MiB at a time. A single larger tensor goes alone.
BUCKET_ELEMENTS = 2**24

# beta ** NO_CORRECTION_STEP is 0 in double precision for every beta up to 1 - 1e-6.
NO_CORRECTION_STEP = 1e9


def fused_adam(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    bias_correction: bool = True,
    div_scale: float = -1,
) -> None:
    """One Adam step in place for tensors of one device; `decoupled` is AdamW's weight decay.

    Parameters and moments share one dtype; gradients of another are converted bucket by bucket.
    `div_scale` above 0 divides the gradients first (the product of loss scale and clipping factor).
    """
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    for rows in _buckets(list(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True))):
        bucket_params = [row[0] for row in rows]
        # The kernels read step and scale as fp32 tensors on the parameters' device.
        scalar = torch.ones((), dtype=torch.float32, device=bucket_params[0].device)
        at_step = scalar * (step if bias_correction else NO_CORRECTION_STEP)
        kernel(
            bucket_params,
            # The fused kernels take one dtype for all four lists.
            [grad.to(param.dtype) for param, grad, *_ in rows],
            [row[2] for row in rows],
            [row[3] for row in rows],
            [],
            [at_step] * len(rows),
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scalar * div_scale if div_scale > 0 else None,
            found_inf=None,
        )


def _buckets(rows: list[tuple[torch.Tensor, ...]]) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    bucket: list[tuple[torch.Tensor, ...]] = []
    elements = 0
    for row in rows:
        if bucket and elements + row[0].numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append(row)
        elements += row[0].numel()
    if bucket:
        yield bucket


class TorchCpuAdam:
    """What `CPUAdamLoader` hands to ColossalAI's optimizers: one parameter per call."""

    def __init__(
        self, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, adamw: bool
    ) -> None:
        # Every call of `step` names the other settings again.
        self.adamw = adamw

    def step(
        self,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        div_scale: float,
    ) -> None:
        fused_adam(
            [param],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            step=step,
            lr=lr,
            betas=(beta1, beta2),
            eps=eps,
            weight_decay=weight_decay,
            decoupled=self.adamw,
            bias_correction=bool(bias_correction),
            div_scale=div_scale,
        )


def multi_tensor_adam(
    chunk_size: int,
    overflow: torch.Tensor,
    tensor_lists: list[Tensors],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    div_scale: float,
) -> None:
    """ColossalAI's CUDA kernel by the same signature; the lists are gradients, parameters, moments.

    `chunk_size` shapes a launch that torch shapes itself; `overflow` is unused there too.
    """
    grads, params, exp_avgs, exp_avg_sqs = tensor_lists
    fused_adam(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        step=step,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        decoupled=mode == 1,
        bias_correction=bool(bias_correction),
        div_scale=div_scale,
    )


class CpuAdamModule:
    """Stands where ColossalAI expects its compiled CPU Adam module."""

    CPUAdamOptimizer = TorchCpuAdam


class FusedOptimizerModule:
    """Stands where ColossalAI expects its compiled CUDA module; HybridAdam asks it for Adam."""

    multi_tensor_adam = staticmethod(multi_tensor_adam)

    def __getattr__(self, name: str) -> Never:
        raise UserError(
            f"ColossalAI asked for the CUDA kernel {name}; got an optimizer that needs it, "
            "expected one that needs multi_tensor_adam only. Use HybridAdam."
        )


class _TorchExtension(_Extension):
    """A kernel that needs no building."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, support_aot=False, support_jit=False, priority=10)

    def assert_compatible(self) -> None:
        return None

    def build_aot(self) -> Never:
        raise NotImplementedError(f"{self.name} is part of torch")

    def build_jit(self) -> Never:
        raise NotImplementedError(f"{self.name} is part of torch")


class CpuAdamExtension(_TorchExtension):
    def __init__(self) -> None:
        super().__init__("cpu_adam_torch")

    def is_available(self) -> bool:
        return True

    def load(self) -> type[CpuAdamModule]:
        return CpuAdamModule


class FusedOptimizerExtension(_TorchExtension):
    def __init__(self) -> None:
        super().__init__("fused_optimizer_torch")

    def is_available(self) -> bool:
        return torch.cuda.is_available()

    def load(self) -> FusedOptimizerModule:
        return FusedOptimizerModule()


def register() -> list[str]:
    """Register the kernels with ColossalAI's loaders; returns their names.

    The loader asks every available extension whether its compiler fits (nvcc, in the built-in ones'
    case) before it compares priorities, and warns when several are left. So ours stays alone.
    """
    CPUAdamLoader.register_extension(CpuAdamExtension)
    CPUAdamLoader.REGISTRY[:] = [CpuAdamExtension]
    names = ["cpu_adam_torch"]
    if torch.cuda.is_available():
        FusedOptimizerLoader.register_extension(FusedOptimizerExtension)
        FusedOptimizerLoader.REGISTRY[:] = [FusedOptimizerExtension]
        names.append("fused_optimizer_torch")
    return names


@torch.no_grad()
def hybrid_adam_step(
    self: Any, closure: Callable[[], torch.Tensor] | None = None, div_scale: float = -1
) -> torch.Tensor | None:
    """HybridAdam.step with one fused call per parameter group, device and dtype.

    ColossalAI's own step sends bf16 gradients on the CPU past the kernel and drops `div_scale`
    there, which silently turns clipping off for gemini's offloaded part, on GPU machines too.
    """
    if self.nvme_offload_fraction > 0:
        raise UserError(
            "offloading to NVMe is not supported; got nvme_offload_fraction "
            f"{self.nvme_offload_fraction}, expected 0. Use --offload_optim_frac instead."
        )
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    self._pre_step("exp_avg", "exp_avg_sq")
    for group in self.param_groups:
        rows_by_kind: dict[tuple[Any, ...], list[tuple[torch.Tensor, ...]]] = defaultdict(list)
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if len(state) == 0:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
                self._post_state_init(param)
            state["step"] += 1
            rows_by_kind[(param.device, param.dtype, state["step"])].append(
                (param.data, param.grad.data, state["exp_avg"], state["exp_avg_sq"])
            )
        for (_, _, step), rows in rows_by_kind.items():
            params, grads, exp_avgs, exp_avg_sqs = (
                list(column) for column in zip(*rows, strict=True)
            )
            fused_adam(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                step=step,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled=self.adamw_mode,
                bias_correction=group["bias_correction"],
                div_scale=div_scale,
            )
    self._post_step()
    return loss
