"""Building the model: lazy or not, weights depend on the seed and the parameter's name alone.

And what the model is handed for a micro-batch; what comes out of it is tests/distributed's.
"""

import contextlib
import hashlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig

from llama_lib import engine, host, progress
from llama_lib.config import parse_options
from llama_lib.criterion import IGNORED
from llama_lib.engine import Engine, MicroBatch
from llama_lib.initial_model import build_model
from llama_lib.layout import layout_of

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


@pytest.fixture
def process_group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def engine_of(flags: str) -> Engine:
    options = parse_options("pretrain", f"-d unused -p zero2 -x bf16 -b 2 {flags}".split())
    return Engine(options, layout_of(options, 1), LlamaConfig(**CONFIG), CPU, accumulation=1)


def test_the_score_is_what_transformers_says(process_group):
    """On every replica: loss times weights, and how many labels are the likeliest token."""
    engine_ = engine_of("")
    ids = torch.randint(100, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = IGNORED
    weights = torch.rand(4, 9, generator=torch.Generator().manual_seed(1))
    weights[2, 3] = 0.0
    with torch.no_grad():
        logits = engine_.module(input_ids=ids).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    counted = (labels != IGNORED) & (weights > 0)
    right = (logits.argmax(-1) == labels[:, 1:]) & counted[:, 1:]
    batches = [
        MicroBatch(ids[rows], labels[rows], weights=weights[rows])
        for rows in (slice(0, 2), slice(2, 4))
    ]
    found = engine_.score(batches)
    assert found.loss_sum == pytest.approx((losses * weights[:, 1:]).sum().item(), rel=1e-5)
    assert found.labels == counted[:, 1:].sum()
    assert found.correct == right.sum()


def test_the_kernels_of_a_run_are_named(process_group):
    assert engine_of("-g").describe_kernels() == (
        "kernels: attention sdpa; norms, rotary embedding and SwiGLU torch; loss from a piece of "
        "the logits at a time; recompute full"
    )
    assert "loss from all logits at once" in engine_of("--no-chunked_loss").describe_kernels()


DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]], dtype=torch.int32)


def micro_batch(documents: torch.Tensor | None) -> MicroBatch:
    ids = torch.arange(12).view(2, 6)
    return MicroBatch(ids, ids, documents)


def test_documents_reach_the_model_as_a_mask_and_positions(process_group):
    masked = engine_of("--document_mask")
    assert "attention sdpa_block_mask;" in masked.describe_kernels()
    inputs = masked._inputs(micro_batch(DOCUMENTS))
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]]
    seen = inputs["attention_mask"].allowed.sum(-1).squeeze(1)  # tokens each token sees
    assert torch.equal(seen, inputs["position_ids"] + 1)
    # What samples of text are written with.
    assert list(masked._inputs(micro_batch(None))) == ["input_ids"]


def test_a_mask_is_built_once_per_micro_batch(process_group, monkeypatch):
    kernel, built = engine.KERNELS["sdpa_block_mask"], []

    def counted(documents, device):
        built.append(documents)
        return kernel(documents, device)

    monkeypatch.setitem(engine.KERNELS, "sdpa_block_mask", counted)
    masked = engine_of("--document_mask -g")
    batches = [micro_batch(DOCUMENTS), micro_batch(DOCUMENTS.flip(0))]
    masked.forward_backward(batches, 20)
    assert len(built) == 2
    assert built[0] is batches[0].documents and built[1] is batches[1].documents


def test_documents_are_never_dropped_in_silence(process_group):
    with pytest.raises(AssertionError, match="without --document_mask"):
        engine_of("").forward_backward([micro_batch(DOCUMENTS)], 10)


def test_every_micro_batch_is_progress():
    """A step of many, longer than --stall_timeout, was ended as a run that hangs."""
    model = SimpleNamespace(
        layout=SimpleNamespace(pp=1, dp=1, sequence_axis=1),
        device=CPU,
        optimizer=None,
        booster=SimpleNamespace(backward=lambda loss, optimizer: None),
        _gradient_sync=lambda last: contextlib.nullcontext(),
        _loss_sum=lambda batch, weight: torch.ones(()),
    )
    before = progress.count()
    Engine.forward_backward(model, [None] * 3, 1.0)
    assert progress.count() - before == 3
