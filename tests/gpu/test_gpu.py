"""On one NVIDIA GPU: the five plugins, kernels, flash attention, documents, resume, memory."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.launching import run, start
from tests.distributed.test_resume import COMPARED, Folder

pytestmark = pytest.mark.gpu

STEPS = 40
PLUGINS = {
    "gemini": "-p gemini",
    "gemini_offload": "-p gemini --offload_optim_frac 1.0 --offload_param_frac 1.0",
    "gemini_auto": "-p gemini_auto",
    "zero2": "-p zero2",
    "zero2_cpu": "-p zero2_cpu",
    "hybrid_parallel": "-p hybrid_parallel",
}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "run")


def train(folder: Folder, flags: list[str], more: str) -> str:
    arguments = folder.arguments(*flags, "-b", "16", *more.split())
    outcome = run("pretrain.py", arguments, folder.log("run"))
    assert outcome.code == 0, outcome.output
    return outcome.output


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_trains(plugin: str, precision: str, flags: list[str], folder: Folder) -> None:
    output = train(folder, flags, f"{PLUGINS[plugin]} -x {precision} --max_steps {STEPS}")
    assert "gloo" not in output
    losses = [record["loss"] for record in folder.records]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.3
    scales = {record["loss_scale"] for record in folder.records}
    assert (scales == {None}) == (precision == "bf16")


def test_memory_is_that_of_the_gpu(flags: list[str], folder: Folder) -> None:
    """The peak of torch's allocator in MB of 2^20 bytes; a process on this GPU cannot hold more."""
    output = train(folder, flags, "-p zero2 -x bf16 --max_steps 5")
    reported = float(re.findall(r"max memory usage:\s+([\d.]+) MB", output)[-1])
    records = folder.records
    assert reported == pytest.approx(max(record["memory_mb"] for record in records), abs=0.01)
    parameters = int(re.findall(r"([\d,]+) parameters", output)[0].replace(",", ""))
    # bf16 weights, fp32 master and two moments
    assert parameters * 14 / 2**20 < reported
    assert reported < torch.cuda.get_device_properties(0).total_memory / 2**20
    assert all(record["tflops_per_gpu"] > 0 for record in records)


@pytest.mark.parametrize("plugin", ["gemini", "zero2", "hybrid_parallel"])
def test_flash_attention_trains_as_attention_does(
    plugin: str, flags: list[str], folder: Folder, tmp_path: Path
) -> None:
    flash = Folder(tmp_path / "flash")
    command = f"{PLUGINS[plugin]} -x bf16 --max_steps {STEPS}"
    train(folder, flags, command)
    train(flash, flags, command + " -a")
    expected = [record["loss"] for record in folder.records]
    assert [record["loss"] for record in flash.records] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_document_mask_trains(plugin: str, flags: list[str], folder: Folder) -> None:
    command = f"{PLUGINS[plugin]} -x bf16 --document_mask -g --max_steps {STEPS}"
    output = train(folder, flags, command)
    assert re.search(r"kernels: attention (flex_attention|flash_attn_varlen)", output)
    losses = [record["loss"] for record in folder.records]
    assert losses[-1] < losses[0] - 0.3


def documents_of(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return (torch.rand(rows, length, generator=generator) < 0.02).cumsum(1).int()


def skip_without_flash_attn(kernel: str, precision: torch.dtype) -> None:
    if kernel == "flash_attn_varlen":
        pytest.importorskip("flash_attn")
        if precision == torch.float32:
            pytest.skip("flash-attn computes in half precision only")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [32, 200, 1024])
@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attn_varlen"])
def test_a_document_kernel_is_sdpa_with_the_block_mask(
    kernel: str, length: int, precision: torch.dtype
) -> None:
    """Output and gradients, with fewer key-value heads than heads, against fp32."""
    from llama_lib.document_attention import KERNELS

    skip_without_flash_attn(kernel, precision)
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    states = [torch.randn(3, heads, length, 64, device=device) for heads in (8, 2, 2)]
    upstream = torch.randn(3, length, 8, 64, device=device)
    results = []
    for name, dtype in ((kernel, precision), ("sdpa_block_mask", torch.float32)):
        mask = KERNELS[name](documents_of(3, length), device)
        query, key, value = (each.to(precision).to(dtype).requires_grad_() for each in states)
        output = mask.attend(query, key, value, 0.125)
        output.backward(upstream.to(dtype))
        results.append([output, query.grad, key.grad, value.grad])
    # fp32 products may be tf32's.
    tolerance = 5e-3 if precision == torch.float32 else 3e-2
    for found, expected in zip(*results, strict=True):
        assert found.dtype == precision
        torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attn_varlen"])
def test_a_model_with_a_document_kernel_is_one_with_the_block_mask(kernel: str) -> None:
    """Loss and gradients over three micro-batches, recomputed in the backward pass."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_lib.document_attention import (
        KERNELS,
        document_positions,
        use_document_attention,
    )

    skip_without_flash_attn(kernel, torch.bfloat16)
    device = torch.device("cuda", 0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    results = []
    for name in (kernel, "sdpa_block_mask"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(device, torch.bfloat16).train()
        use_document_attention(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = []
        for length in (256, 300, 1024):
            documents = documents_of(2, length)
            ids = torch.randint(0, 512, (2, length)).to(device)
            logits = model(
                input_ids=ids,
                attention_mask=KERNELS[name](documents, device),
                position_ids=document_positions(documents).to(device),
            ).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
            )
            loss.backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        results.append([*losses, norm])
    assert results[0] == pytest.approx(results[1], rel=1e-2)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_killed_and_resumed_is_the_same_run(
    plugin: str, flags: list[str], folder: Folder, tmp_path: Path
) -> None:
    """Rows of 32 tokens fit one block of every attention kernel, so sums have one order."""
    broken = Folder(tmp_path / "broken")
    command = f"{PLUGINS[plugin]} -x bf16 --max_steps {STEPS} -i 5"
    train(folder, flags, command)
    first = broken.arguments(*flags, "-b", "16", *command.split())
    with start("pretrain.py", first, broken.log("first")) as started:
        started.wait_until((broken.save_dir / "step-00000005").exists)
        started.kill()
    train(broken, flags, command + " --load auto")
    for expected, found in zip(folder.records, broken.records, strict=True):
        assert {k: found[k] for k in COMPARED} == {k: expected[k] for k in COMPARED}
    assert broken.batches() == folder.batches()


@pytest.fixture
def state() -> Iterator[dict[str, list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1000,), (64, 33), (7, 5, 3)]
    names = ("params", "grads")
    yield {
        name: [torch.randn(shape, generator=generator).cuda() for shape in shapes] for name in names
    }


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [-1.0, 128.0])
def test_the_optimizer_kernel_is_adamw(
    state: dict[str, list[torch.Tensor]], precision: torch.dtype, scale: float
) -> None:
    """What ColossalAI calls for Adam on a GPU, three steps against torch.optim.AdamW."""
    from llama_lib import host

    host.install()
    from llama_lib.host.kernels import multi_tensor_adam

    grads = [grad.to(precision) for grad in state["grads"]]
    expected = [torch.nn.Parameter(param.clone()) for param in state["params"]]
    optimizer = torch.optim.AdamW(expected, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    found = [param.clone() for param in state["params"]]
    moments = [[torch.zeros_like(param) for param in found] for _ in range(2)]
    overflow = torch.zeros(1, dtype=torch.int, device="cuda")
    for step in range(1, 4):
        for param, grad in zip(expected, grads, strict=True):
            param.grad = grad.float() / max(scale, 1.0)
        optimizer.step()
        multi_tensor_adam(
            2**16, overflow, [grads, found, *moments], 1e-2, 0.9, 0.95, 1e-8, step, 1, 1, 0.1, scale
        )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_colossalai_finds_the_kernel_without_a_compiler() -> None:
    from llama_lib import host

    assert "fused_optimizer_torch" in host.install()
    from colossalai.kernel.kernel_loader import FusedOptimizerLoader

    from llama_lib.host.kernels import multi_tensor_adam

    assert FusedOptimizerLoader().load().multi_tensor_adam is multi_tensor_adam
