"""Predicted activation bytes against the tensors that autograd saves of transformers' own Llama."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama_lib import recompute
from llama_lib.chunked_loss import ChunkedHead, linear_cross_entropy
from llama_lib.criterion import token_losses
from llama_lib.engine import DTYPES
from llama_lib.layout import Layout
from llama_lib.models import Shape
from llama_lib.planner import activations
from llama_lib.planner.job import Job

TOLERANCE = 0.05

SHAPES = {
    "gqa": Shape(512, 128, 352, 3, 8, 2, 16, 512),
    "mha": Shape(512, 128, 352, 3, 8, 8, 16, 512),
    "tied": Shape(512, 128, 352, 3, 8, 4, 16, 512, tie_word_embeddings=True),
    # Heads that together are wider than the model, and a vocabulary no power of two.
    "wide": Shape(1000, 96, 512, 2, 4, 2, 32, 512),
    "deep": Shape(320, 64, 160, 7, 4, 1, 16, 512),
}


def job_of(shape: Shape, rows: int = 3, length: int = 48, **others: Any) -> Job:
    settings = {"precision": "bf16", "chunked_loss": False} | others
    layout = Layout("zero2", 1, zero_stage=2)
    return Job(shape, layout, rows, 1, rows, length, **settings)


def build(job: Job, attention: str = "sdpa") -> LlamaForCausalLM:
    values = dict(vars(job.shape))
    for name in ("model_type", "sliding_window"):
        del values[name]
    config = LlamaConfig(**values, use_cache=False, attn_implementation=attention)
    model = LlamaForCausalLM(config).to(DTYPES[job.precision]).train()
    recompute.use_recompute(model, job.recompute)
    return model


@dataclass
class Saved:
    """Distinct storages, parameters left out, in the order they were saved."""

    parameters: set[int]
    sizes: dict[int, int] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)  # so that no address is used again

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters | self.sizes.keys():
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.alive.append(tensor.detach())
        return tensor

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


@contextmanager
def saving(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[Saved]:
    """What autograd saves in the block, and what selective recomputation keeps beside it."""
    saved = Saved({p.untyped_storage().data_ptr() for p in model.parameters()})
    leave = recompute.Keeping.__exit__

    def leaving(self: recompute.Keeping, *exception: Any) -> None:
        leave(self, *exception)
        for _, output in self.results:
            torch.utils._pytree.tree_map_only(Tensor, saved.add, output)

    with monkeypatch.context() as patch:
        patch.setattr(recompute.Keeping, "__exit__", leaving)
        with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
            yield saved


def ids_of(job: Job) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (job.microbatch_size, job.max_length)
    return torch.randint(0, job.shape.vocab_size, shape, generator=generator)


def forward_bytes(job: Job, monkeypatch: pytest.MonkeyPatch, attention: str = "sdpa") -> int:
    """Saved by a forward pass up to the logits."""
    model = build(job, attention)
    mask = None
    if attention == "eager":
        mask = torch.zeros(1, 1, job.max_length, job.max_length, dtype=DTYPES[job.precision])
    with saving(model, monkeypatch) as saved:
        model(input_ids=ids_of(job), attention_mask=mask)
    return saved.total


def shape_params() -> list[Any]:
    rows = []
    for name in SHAPES:
        for mode in ("none", "selective", "full"):
            quick = name == "gqa" or (name, mode) == ("mha", "none")
            rows.append(pytest.param(name, mode, marks=[] if quick else pytest.mark.full))
    return rows


@pytest.mark.parametrize(("name", "mode"), shape_params())
def test_forward_pass(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(SHAPES[name], recompute=mode)
    found = forward_bytes(job, monkeypatch)
    predicted = activations.micro_batch_bytes(job, job.shape.num_hidden_layers)
    assert predicted == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.full)])
def test_one_layer_to_the_byte(mode: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference that one more layer makes: no constant can hide an error."""
    job = job_of(SHAPES["gqa"], recompute=mode, precision=precision)
    one_more = replace(job, shape=replace(job.shape, num_hidden_layers=4))
    found = forward_bytes(one_more, monkeypatch) - forward_bytes(job, monkeypatch)
    assert activations.layer_bytes(job) == found


@pytest.mark.parametrize(("rows", "length"), [(1, 16), (1, 200), (6, 24), (2, 64)])
def test_rows_and_lengths(rows: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(SHAPES["gqa"], rows, length)
    predicted = activations.micro_batch_bytes(job, job.shape.num_hidden_layers)
    assert predicted == pytest.approx(forward_bytes(job, monkeypatch), rel=TOLERANCE)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.full)])
def test_attention_that_keeps_its_scores(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ColossalAI's attention under sequence parallelism is transformers' eager one, written out."""
    job = job_of(SHAPES["gqa"], 2, 96, flash=False, precision=precision)
    predicted = activations.micro_batch_bytes(job, job.shape.num_hidden_layers)
    assert predicted == pytest.approx(forward_bytes(job, monkeypatch, "eager"), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["gqa", pytest.param("tied", marks=pytest.mark.full)])
def test_whole_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(SHAPES[name])
    model, ids = build(job), ids_of(job)
    logits = model(input_ids=ids).logits
    with saving(model, monkeypatch) as saved:
        token_losses(logits, ids).sum()
    assert activations.loss_saved_bytes(job) == pytest.approx(saved.total, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "chunk_elements"),
    [("gqa", 2**24), ("gqa", 2**13), pytest.param("tied", 2**13, marks=pytest.mark.full)],
)
def test_chunked_loss(name: str, chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward pass and loss together: the head's input is not kept."""
    monkeypatch.setattr("llama_lib.chunked_loss.CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setattr(activations, "CHUNK_ELEMENTS", chunk_elements)
    job = job_of(SHAPES[name], chunked_loss=True)
    model, ids = build(job), ids_of(job)
    head = ChunkedHead(model.lm_head, job.shape.vocab_size)
    with saving(model, monkeypatch) as saved:
        with head.asked_for(lambda hidden, weight: linear_cross_entropy(hidden, weight, ids)):
            _ = model(input_ids=ids).logits
    predicted = activations.micro_batch_bytes(job, job.shape.num_hidden_layers)
    predicted += activations.loss_saved_bytes(job)
    assert predicted == pytest.approx(saved.total, rel=TOLERANCE)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_adapters(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen weights need no normalised inputs, adapters the inputs of every linear layer."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shape = Shape(512, 256, 704, 6, 8, 4, 32, 512)
    job = job_of(shape, recompute=mode, lora_parameters=1)
    model = get_peft_model(build(job), LoraConfig(r=2, target_modules=names)).bfloat16()
    with saving(model, monkeypatch) as saved:
        model(input_ids=ids_of(job))
    predicted = activations.micro_batch_bytes(job, shape.num_hidden_layers)
    assert predicted == pytest.approx(saved.total, rel=TOLERANCE)


def test_recomputing_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is computed again saves what it saves without recomputation."""
    job = job_of(SHAPES["gqa"], recompute="full")
    plain = activations.layer_bytes(replace(job, recompute="none"))
    assert activations.recomputed_bytes(job) == plain
    selective = replace(job, recompute="selective")
    assert 0 < activations.recomputed_bytes(selective) < plain
    assert activations.recomputed_bytes(replace(job, recompute="none")) == 0


def test_tensor_parallelism_divides_heads_width_and_logits() -> None:
    shape = SHAPES["gqa"]
    whole = job_of(shape, chunked_loss=False)
    halves = replace(whole, layout=Layout("hybrid_parallel", 2, tp=2))
    gathered = replace(halves, layout=Layout("hybrid_parallel", 2, 2, 1, 2, "split_gather"))
    tokens, element = 3 * 48, 2
    wide = 5 * element * tokens * 128 + 4 * tokens * 8 + 4 * element * tokens * 352
    assert activations.layer_bytes(whole) - activations.layer_bytes(halves) == wide // 2
    # Norms: the fp32 input, the inverse root, the normalised and the scaled result.
    norms = 2 * tokens * (4 * 128 + 4 + 2 * element * 128)
    assert activations.layer_bytes(halves) == norms + wide // 2
    assert activations.layer_bytes(gathered) == norms // 2 + wide // 2
    assert activations.loss_saved_bytes(halves) == 4 * tokens * 512 // 2
