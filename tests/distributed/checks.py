"""Checks that run inside a process group, one engine at a time; each returns plain data.

Invariant: every rank returns the same; what the data must be is said in the tests, not here.
"""

import hashlib
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PretrainedConfig

from llama_lib.checkpoint import store
from llama_lib.checkpoint.state import gather_optimizer, gather_weights
from llama_lib.checkpoint.verify import checkpoint_problems
from llama_lib.engine import Engine, MicroBatch
from llama_lib.errors import RunError
from llama_lib.initial_model import build_model
from llama_lib.layout import layout_of
from llama_lib.optim import learning_rate, set_learning_rate
from tests.distributed import plain_loop
from tests.distributed.cases import (
    LEARNING_RATE,
    LENGTH,
    MODEL,
    SEED,
    STEPS,
    WARMUP,
    model_type,
    options_of,
)
from tests.distributed.plain_loop import IGNORED, batch, num_labels, packed_batch, plain_config

POISONED = (3, 4)

Report = dict[str, Any]


def llama_config(layout: str, length: int = LENGTH) -> PretrainedConfig:
    config = plain_config(model_type(layout), length)
    # As preflight chooses: ColossalAI's own attention takes over under sequence parallelism.
    config._attn_implementation = "eager" if "_to_all" in layout or "split_" in layout else "sdpa"
    return config


def build(layout: str, precision: str, clipping: float = 1.0, length: int = LENGTH) -> Engine:
    options = options_of(layout, precision)
    options.training.gradient_clipping = clipping
    return Engine(
        options,
        layout_of(options, dist.get_world_size()),
        llama_config(layout, length),
        torch.device("cpu"),
        options.training.accumulation_steps,
    )


def rows_per_step(engine: Engine) -> int:
    training = engine.options.training
    return training.batch_size * training.accumulation_steps * engine.layout.dp


def micro_batches(
    engine: Engine,
    ids: torch.Tensor,
    labels: torch.Tensor,
    documents: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> list[MicroBatch]:
    """This rank's part of a global batch; replica r takes the r-th consecutive part."""
    size = engine.options.training.batch_size
    count = size * engine.options.training.accumulation_steps
    first = engine.dp_rank * count
    return [
        MicroBatch(
            *(
                None if each is None else each[start : start + size]
                for each in (ids, labels, documents, weights)
            )
        )
        for start in range(first, first + count, size)
    ]


def train_step(engine: Engine, step: int) -> tuple[float, float | None]:
    """(loss, gradient norm) of one step of the shared batches and schedule."""
    rows = rows_per_step(engine)
    masked = engine.options.model.document_mask
    ids, labels, documents = packed_batch(step, rows) if masked else (*batch(step, rows), None)
    set_learning_rate(engine.optimizer, learning_rate(step, STEPS, WARMUP, LEARNING_RATE))
    batches = micro_batches(engine, ids, labels, documents)
    share = engine.forward_backward(batches, num_labels(labels))
    return engine.reduce_loss(share), engine.step().value


def _sha256(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def merged(part: dict[str, Any]) -> dict[str, Any]:
    """What the ranks hold together, sorted by name."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return dict(sorted((name, value) for held in parts for name, value in held.items()))


def weight_hashes(engine: Engine) -> dict[str, str]:
    return merged({name: _sha256(tensor) for name, tensor in gather_weights(engine)})


def optimizer_hashes(engine: Engine) -> dict[str, str]:
    return merged(
        {
            f"{name}/{key}": f"{step} {_sha256(tensor)}"
            for name, step, tensors in gather_optimizer(engine)
            for key, tensor in tensors.items()
        }
    )


def plain_weights(layout: str, precision: str) -> dict[str, torch.Tensor]:
    """The initial weights of a model that no plugin has touched."""
    model = build_model(
        plain_config(model_type(layout)),
        plain_loop.DTYPES[precision],
        SEED,
        torch.device("cpu"),
        lazy=False,
    )
    return dict(model.state_dict())


# -- the checks ------------------------------------------------------------------------------------

_plain_curves: dict[tuple[str, str, int, frozenset[int], bool], plain_loop.Curve] = {}


def _plain(layout: str, engine: Engine, skipped: frozenset[int]) -> Report:
    kind, precision = model_type(layout), engine.options.training.mixed_precision
    rows, masked = rows_per_step(engine), engine.options.model.document_mask
    key = (kind, precision, rows, skipped, masked)
    if key not in _plain_curves:
        model = plain_loop.plain_model(kind, plain_weights(layout, precision), precision)
        _plain_curves[key] = plain_loop.train(model, plain_loop.mean_loss(rows, masked), skipped)
    return vars(_plain_curves[key])


def truth(layout: str, precision: str, folder: Path) -> Report:
    """STEPS steps of the engine and of the plain loop, and the weights both began with.

    Steps that the engine skips while its fp16 loss scale settles are left out of the plain loop.
    """
    engine = build(layout, precision)
    initial = weight_hashes(engine)
    results = [train_step(engine, step) for step in range(1, STEPS + 1)]
    overflows = frozenset(step for step, (_, norm) in enumerate(results, 1) if norm is None)
    return {
        "losses": [loss for loss, _ in results],
        "norms": [norm for _, norm in results],
        "plain": _plain(layout, engine, overflows),
        "overflows": sorted(overflows),
        "initial_weights": initial,
        "plain_weights": {
            name: _sha256(tensor)
            for name, tensor in sorted(plain_weights(layout, precision).items())
        },
        "loss_scale": engine.loss_scale(),
    }


def nonfinite(layout: str, precision: str, folder: Path) -> Report:
    """The gradients of some steps are NaN; what these change, and the curve around them."""
    engine = build(layout, precision)
    # Under dp one replica's NaN is enough; within a replica every rank meets it.
    strikes = engine.dp_rank == engine.layout.dp - 1

    # Stages of a pipeline take the loss from logits, the others where the head is.
    place = engine.criterion if engine.layout.pp > 1 else engine
    name = "loss_sum" if engine.layout.pp > 1 else "_loss_sum"
    exact = getattr(place, name)

    def poisoned(*arguments: Any) -> torch.Tensor:
        return exact(*arguments) * (math.nan if strikes else 1.0)

    losses, norms, changed = [], [], []
    for step in range(1, STEPS + 1):
        if step in POISONED:
            before = weight_hashes(engine), optimizer_hashes(engine)
            setattr(place, name, poisoned)
        loss, norm = train_step(engine, step)
        if step in POISONED:
            setattr(place, name, exact)
            if before != (weight_hashes(engine), optimizer_hashes(engine)):
                changed.append(step)
        losses.append(loss)
        norms.append(norm)
    skipped = frozenset(POISONED) | {s for s, norm in enumerate(norms, 1) if norm is None}
    return {
        "losses": losses,
        "norms": norms,
        "changed": changed,
        "skipped": sorted(skipped),
        "plain": _plain(layout, engine, skipped),
    }


def clipping(layout: str, precision: str, folder: Path) -> Report:
    """The gradient that reached Adam in one step, seen in its first moment."""
    bound = 0.125
    engine = build(layout, precision, clipping=bound)
    _, norm = train_step(engine, 1)
    squares = merged(
        {
            name: float(tensors["exp_avg"].double().square().sum())
            for name, _, tensors in gather_optimizer(engine)
        }
    )
    return {"bound": bound, "norm": norm, "applied": math.sqrt(sum(squares.values())) / (1 - 0.9)}


def causality(layout: str, precision: str, folder: Path) -> Report:
    """Loss of every label token, before and after one input token is another."""
    engine = build(layout, precision)
    for step in range(1, 4):  # at initialisation attention is near uniform and would hide little
        train_step(engine, step)
    rows = rows_per_step(engine)
    ids, _ = batch(1, rows)
    report: Report = {"plain": list(_token_losses(engine, ids))}
    for position in (LENGTH // 2, LENGTH - 1):
        other = ids.clone()
        other[:, position] = (other[:, position] + 7) % MODEL["vocab_size"]
        report[str(position)] = list(_token_losses(engine, other, labelled=ids))
    return report


def _token_losses(
    engine: Engine,
    ids: torch.Tensor,
    labelled: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> Iterator[float]:
    """The loss at every position that has a label, from 0."""
    targets = ids if labelled is None else labelled
    for position in range(LENGTH - 1):
        labels = torch.full_like(ids, IGNORED)
        labels[:, position + 1] = targets[:, position + 1]
        yield engine.score(micro_batches(engine, ids, labels, documents)).loss_sum


# Documents of a row; each has ids of its own, so that the embedding's gradient tells them apart.
BORDERS = {"first": (0, 10), "middle": (10, 21), "last": (21, LENGTH)}
IDS = {"first": range(0, 150), "middle": range(150, 300), "last": range(300, 450)}


def isolation(layout: str, precision: str, folder: Path) -> Report:
    """What one document of a row has to do with another: in gradients, and in every token's loss.

    "alone" are the losses of every document on its own in plain transformers.
    """
    engine = build(layout, precision)
    rows = rows_per_step(engine)
    generator = torch.Generator().manual_seed(rows)
    ids = torch.cat([_random_ids(name, rows, generator) for name in BORDERS], dim=1)
    lengths = torch.tensor([stop - start for start, stop in BORDERS.values()])
    documents = torch.arange(len(lengths)).repeat_interleave(lengths).int().repeat(rows, 1)
    report: Report = {"borders": BORDERS}
    report["reached"] = _reached(engine, ids, documents)
    report["reached_without_a_mask"] = _reached(engine, ids, None)
    for step in range(1, 4):  # at initialisation attention is near uniform and would hide little
        train_step(engine, step)
    report["losses"] = list(_token_losses(engine, ids, documents=documents))
    for name, (start, stop) in BORDERS.items():
        other = ids.clone()
        other[:, start:stop] = _random_ids(name, rows, generator)
        losses = _token_losses(engine, other, labelled=ids, documents=documents)
        pairs = zip(losses, report["losses"], strict=True)
        report[f"moved_by_{name}"] = [index for index, (a, b) in enumerate(pairs) if a != b]
    weights = merged({name: tensor.detach().cpu() for name, tensor in gather_weights(engine)})
    model = plain_loop.plain_model(model_type(layout), weights, precision)
    report["alone"] = _losses_alone(model, ids)
    return report


def _random_ids(name: str, rows: int, generator: torch.Generator) -> torch.Tensor:
    start, stop = BORDERS[name]
    return torch.randint(IDS[name].start, IDS[name].stop, (rows, stop - start), generator=generator)


def _reached(engine: Engine, ids: torch.Tensor, documents: torch.Tensor | None) -> list[str]:
    """The documents whose embeddings have changed Adam's first moment once the loss of the middle
    one has been minimised for a step."""
    before = _embedding_moment(engine)
    labels = torch.full_like(ids, IGNORED)
    middle = slice(BORDERS["middle"][0] + 1, BORDERS["middle"][1])
    labels[:, middle] = ids[:, middle]
    batches = micro_batches(engine, ids, labels, documents)
    engine.forward_backward(batches, num_labels(labels))
    engine.step()
    moved = (_embedding_moment(engine) != before).any(dim=1)
    return [name for name, part in IDS.items() if moved[part.start : part.stop].any()]


def _embedding_moment(engine: Engine) -> torch.Tensor:
    """The embedding's first moment, zeros before the first step."""
    found = merged(
        {
            name: tensors["exp_avg"].cpu().clone()
            for name, _, tensors in gather_optimizer(engine)
            if "embed_tokens" in name
        }
    )
    return next(iter(found.values()), torch.zeros(MODEL["vocab_size"], MODEL["hidden_size"]))


def _losses_alone(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """By position as in `_token_losses`: the rows' losses together, every document by itself."""
    losses = {}
    for start, stop in BORDERS.values():
        with torch.no_grad():
            logits = model(input_ids=ids[:, start:stop]).logits[:, :-1].float()
        found = cross_entropy(logits.transpose(1, 2), ids[:, start + 1 : stop], reduction="none")
        losses |= {str(start + i): loss for i, loss in enumerate(found.sum(0).tolist())}
    return losses


def saved_model(layout: str, precision: str, folder: Path) -> Report:
    """A trained and saved model's loss in transformers and in the engine that saved it."""
    engine = build(layout, precision)
    for step in range(1, 6):
        train_step(engine, step)
    path = _save(engine, folder, 5)
    rows = rows_per_step(engine)
    ids, labels = batch(99, rows)
    found = engine.score(micro_batches(engine, ids, labels)).loss_sum
    served = LlamaForCausalLM.from_pretrained(path / "model", torch_dtype="auto")
    with torch.no_grad():
        expected = plain_loop.loss_sum(served(input_ids=ids).logits, labels).item()
    mine = [part.input_ids for part in micro_batches(engine, ids, labels)]
    # A pipeline keeps the shape of a training step, as `sample_text` does.
    prompt = torch.cat(mine) if engine.layout.pp > 1 else mine[0]
    position = LENGTH - 3  # under all_to_all in the second half, which another rank holds
    with torch.no_grad():
        logits = served(input_ids=prompt[:1]).logits[0, position].float()
    sampled_from = engine.next_token_logits(prompt, position).cpu()
    rotary = [m for m in engine.module.modules() if hasattr(m, "rope_init_fn")]
    frequencies = served.model.rotary_emb.inv_freq
    return {
        "loss": found,
        "served_loss": expected,
        "served_dtype": str(served.dtype),
        "next_token_difference": float((sampled_from - logits).abs().max() / logits.abs().max()),
        "vocabulary_rows": served.lm_head.weight.shape[0],
        "rotary_dtypes": sorted({str(m.inv_freq.dtype) for m in rotary}),
        "rotary_equal": all(torch.equal(m.inv_freq, frequencies) for m in rotary),
    }


def _save(engine: Engine, folder: Path, step: int) -> Path:
    state = store.TrainerState(step, 0, 0, 0, SEED, {}, scaler=store.scaler_state(engine))
    return store.save(engine, state, None, str(folder), None)


def handover(layouts: str, precision: str, folder: Path) -> Report:
    """Saved by one layout, loaded by another ("a>b"); both then take the same steps."""
    saver, loader = layouts.split(">")
    engine = build(saver, precision)
    for step in range(1, 4):
        train_step(engine, step)
    saved = {"weights": weight_hashes(engine), "optimizer": optimizer_hashes(engine)}
    path = _save(engine, folder, 3)
    straight = [train_step(engine, step)[0] for step in (4, 5, 6)]
    del engine
    engine = build(loader, precision)
    store.load(engine, path, store.read_state(path))
    loaded = {"weights": weight_hashes(engine), "optimizer": optimizer_hashes(engine)}
    resumed = [train_step(engine, step)[0] for step in (4, 5, 6)]
    return {
        "differing": [
            f"{part}: {name}"
            for part, hashes in saved.items()
            for name in hashes.keys() | loaded[part].keys()
            if hashes.get(name) != loaded[part].get(name)
        ],
        "tensors": len(saved["optimizer"]),
        "straight": straight,
        "resumed": resumed,
    }


def full_disk(layout: str, precision: str, folder: Path) -> Report:
    """Every file of the second checkpoint stops growing early, as on a disk that fills up."""
    engine = build(layout, precision)
    train_step(engine, 1)
    first = _save(engine, folder, 1)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, unlimited[1]))
    try:
        _save(engine, folder, 2)
        message = "saved"
    except RunError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    found, _ = store.find_checkpoint("auto", str(folder))
    left = sorted(path.name for path in folder.iterdir())
    second = _save(engine, folder, 2)
    return {
        "message": message,
        "first": str(first),
        "found": str(found),
        "left": left,
        "problems_later": checkpoint_problems(second),
    }


CHECKS: dict[str, Callable[[str, str, Path], Report]] = {
    check.__name__: check
    for check in (
        truth,
        nonfinite,
        clipping,
        causality,
        isolation,
        saved_model,
        handover,
        full_disk,
    )
}
