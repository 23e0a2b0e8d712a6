"""One boosted model: the same forward-backward, step and forward-only calls for every plugin.

Invariant: the gradient is that of the mean loss over all label tokens of the global batch, whatever
the plugin, the layout, the accumulation and the micro-batches; nothing non-finite reaches a weight.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llama_lib.attention import flash_kernel, use_flash_attention
from llama_lib.config import Options
from llama_lib.devices import on_device
from llama_lib.document_attention import (
    KERNELS,
    document_kernel,
    document_positions,
    use_document_attention,
)
from llama_lib.layout import Layout
from llama_lib.optim import build_optimizer, parameter_names
from llama_lib.plugins import Setting, build_plugin, data_parallel_rank, supports_lazy_init

logger = logging.getLogger("llama_lib")

IGNORED = -100

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# ColossalAI pads the vocabulary to a multiple of this times tp (its make_vocab_size_divisible_by).
VOCABULARY_MULTIPLE = 64


@dataclass
class MicroBatch:
    """Rows of one forward pass: `input_ids` and `labels` [rows, length], labels -100 = no loss.

    `documents` [rows, length] numbers the documents of each row in their order; tokens then attend
    within their own document only. Without it attention is causal over the whole row.
    """

    input_ids: Tensor
    labels: Tensor
    documents: Tensor | None = None


@dataclass(frozen=True)
class GradientNorm:
    """Global gradient norm of a step before clipping.

    `scaled` is still multiplied by the loss scale, None if an fp16 overflow skipped the step;
    `scale` is that loss scale on the device, None outside fp16.
    """

    scaled: float | None
    scale: Tensor | None

    @property
    def is_finite(self) -> bool:
        return self.scaled is not None and math.isfinite(self.scaled)

    @property
    def loss_scale(self) -> float | None:
        """The step's loss scale; in fp16 this waits for the device."""
        return None if self.scale is None else self.scale.item()

    @property
    def value(self) -> float | None:
        """The norm; in fp16 this waits for the device."""
        return None if self.scaled is None else self.scaled / (self.loss_scale or 1.0)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create parameters in `dtype` inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def initialise(model: nn.Module, seed: int, device: torch.device) -> None:
    """Fill every parameter from a generator of its own, seeded by `seed` and its name.

    Order of creation, lazy materialisation and sharding then cannot change the weights. Matrices
    get normal(0, initializer_range), vectors (norms) ones: what transformers does for Llama. A lazy
    parameter says it is on the CPU wherever it will be made, hence `device`.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(device=device)
        generator.manual_seed(int.from_bytes(digest[:7], "little"))
        parameter.data.normal_(0.0, model.config.initializer_range, generator=generator)


def build_model(
    config: Any, dtype: torch.dtype, seed: int, device: torch.device, lazy: bool
) -> Any:
    """A causal language model in `dtype` with this project's initial weights."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    if lazy:
        from colossalai.lazy import LazyInitContext

        where: Any = LazyInitContext(default_device=device)
    else:
        where = device
    with where, default_dtype(dtype), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
        initialise(model, seed, device)
        # Lazy parameters take the default dtype of the moment they are made, not of this one.
        return model.to(dtype)


def restore_rotary_frequencies(model: nn.Module, device: torch.device) -> None:
    """Put the rotary frequencies back to fp32.

    The plugins cast every floating buffer to the working precision; frequencies rounded to bf16
    describe other positions than the ones Hugging Face computes when the model is served.
    """
    for module in model.modules():
        if hasattr(module, "rope_init_fn") and hasattr(module, "inv_freq"):
            frequencies, _ = module.rope_init_fn(module.config, device)
            module.register_buffer("inv_freq", frequencies.float(), persistent=False)
            module.original_inv_freq = module.inv_freq


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    multiple = VOCABULARY_MULTIPLE * tp
    return math.ceil(vocab_size / multiple) * multiple


class Engine:
    """A boosted model and optimizer with the calls the training loop needs.

    Attributes:
        names: parameter names in the optimizer's order (its parameter ids).
        shapes: full shape of every parameter by name.
        dp_rank: which replica this process belongs to.
    """

    def __init__(
        self,
        options: Options,
        layout: Layout,
        config: Any,
        device: torch.device,
        accumulation: int,
    ) -> None:
        """Build, initialise and boost the model.

        Args:
            accumulation: micro-steps of `batch_size` rows per optimizer step; under a pipeline they
                are cut into micro-batches and run in one schedule.
        """
        from colossalai.booster import Booster

        self.options, self.layout, self.config, self.device = options, layout, config, device
        setting = Setting(accelerated=device.type != "cpu", accumulation=accumulation)
        self.dtype = DTYPES[options.training.mixed_precision]
        self.plugin = build_plugin(options, layout, config, setting)
        self.booster = Booster(plugin=self.plugin)
        config.use_cache = False
        model = build_model(
            config, self.dtype, options.training.seed, device, supports_lazy_init(layout)
        )
        if options.model.flash_attention:
            logger.info("attention kernel: %s", flash_kernel())
            if layout.plugin != "hybrid_parallel":
                use_flash_attention(model)
        if options.model.document_mask:
            kernel = document_kernel(device, self.dtype)
            logger.info("document mask kernel: %s", kernel)
            self._document_mask = KERNELS[kernel]
            use_document_attention(model)
        if options.model.gradient_checkpoint:
            # Non-reentrant recomputation keeps the graph that ColossalAI's hooks need.
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = build_optimizer(model, options.training.lr, options.training.weight_decay)
        self.names = parameter_names(model, optimizer)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.model, self.optimizer, *_ = self.booster.boost(model, optimizer)
        self.module = self.model.unwrap()
        restore_rotary_frequencies(self.module, device)
        self.dp_rank = data_parallel_rank(self.plugin, layout)
        rows = options.training.batch_size * accumulation
        self.num_micro_batches = rows // (options.parallel.microbatch_size or 1)
        self.is_last_stage = layout.pp == 1 or self.plugin.stage_manager.is_last_stage()
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._guard_optimizer()

    # -- loss --------------------------------------------------------------------------------

    def token_loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum of the next-token losses in fp32.

        Args:
            logits: [rows, length, vocabulary]; under tp this rank's part of the vocabulary, under
                all_to_all this rank's part of the length.
            labels: [rows, length]; position i's label is `labels[i + 1]`.
        """
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if self.layout.sequence_axis > 1:
            part = dist.get_rank(self.plugin.sp_group)
            targets = targets.chunk(self.layout.sequence_axis, dim=1)[part]
        if self.layout.tp == 1:
            return F.cross_entropy(
                logits.reshape(-1, logits.shape[-1]).float(),
                targets.reshape(-1),
                ignore_index=IGNORED,
                reduction="sum",
            )
        from colossalai.shardformer.layer import cross_entropy_1d

        return cross_entropy_1d(
            logits.float(),
            targets,
            ignore_index=IGNORED,
            process_group=self.plugin.tp_group,
            vocab_size=padded_vocabulary(self.config.vocab_size, self.layout.tp),
            dtype=torch.float32,
            mode="sum",
        )

    def _inputs(self, batch: MicroBatch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(self.device, non_blocking=True)}
        if self.layout.sp_mode is not None and not self.options.model.flash_attention:
            # Without an explicit mask ColossalAI's sequence-parallel attention is not causal.
            inputs["attention_mask"] = self._causal_mask(*batch.input_ids.shape)
        if batch.documents is not None:
            assert self.options.model.document_mask, "the model was built without --document_mask"
            inputs["attention_mask"] = self._document_mask(batch.documents, self.device)
            documents = on_device(batch.documents, self.device)
            inputs["position_ids"] = document_positions(documents)
        return inputs

    def _causal_mask(self, rows: int, length: int) -> Tensor:
        """Additive mask [rows, 1, length, length] in the working precision."""
        if (rows, length) not in self._masks:
            lowest = torch.finfo(self.dtype).min
            mask = torch.full((length, length), lowest, dtype=self.dtype, device=self.device)
            self._masks = {(rows, length): mask.triu(1).expand(rows, 1, length, length)}
        return self._masks[rows, length]

    # -- training ----------------------------------------------------------------------------

    def forward_backward(self, batches: list[MicroBatch], num_labels: int) -> Tensor:
        """Accumulate the gradient of the global mean loss over this rank's micro-batches.

        Args:
            num_labels: label tokens of the whole global batch, all ranks together.

        Returns:
            This rank's share of the loss on the device, not synchronised; `reduce_loss` turns the
            shares of all ranks into the loss.
        """
        # Gradients are averaged over replicas and sequence parts, so each weighs its tokens by
        # their number over all label tokens.
        weight = self.layout.dp * self.layout.sequence_axis / num_labels
        if self.layout.pp > 1:
            return self._pipeline(batches, weight)
        share = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            with self._gradient_sync(last=index == len(batches) - 1):
                logits = self.model(**self._inputs(batch)).logits
                loss = self.token_loss_sum(logits, batch.labels.to(self.device)) * weight
                del logits  # the largest tensor of the step, not needed by the backward call
                self.booster.backward(loss, self.optimizer)
                share += loss.detach()
        return share

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Hold back the gradient exchange until the last micro-step where the plugin can."""
        if last or self.layout.plugin != "hybrid_parallel" or self.layout.zero_stage == 2:
            return contextlib.nullcontext()
        return self.booster.no_sync(self.model, self.optimizer)

    def _pipeline(self, batches: list[MicroBatch], weight: float) -> Tensor:
        # The schedule divides every micro-batch's loss by their number.
        scaled = weight * self.num_micro_batches

        def criterion(outputs: Any, micro_batch: dict[str, Tensor]) -> Tensor:
            return self.token_loss_sum(outputs.logits, micro_batch["targets"]) * scaled

        return self._execute_pipeline(batches, criterion, self.optimizer)

    def _execute_pipeline(
        self,
        batches: list[MicroBatch],
        criterion: Callable[[Any, dict[str, Tensor]], Tensor],
        optimizer: Any,
    ) -> Tensor:
        """Run the schedule over all rows; the mean criterion, zero before the last stage."""
        assert all(b.documents is None for b in batches), "a pipeline knows no documents"
        rows = {
            "input_ids": torch.cat([b.input_ids for b in batches]),
            # Named "targets": under "labels" the model would compute a loss of its own.
            "targets": torch.cat([b.labels for b in batches]),
        }
        result = self.booster.execute_pipeline(
            iter([rows]), self.model, criterion=criterion, optimizer=optimizer, return_loss=True
        )
        return result["loss"] if self.is_last_stage else torch.zeros((), device=self.device)

    def step(self) -> "GradientNorm":
        """Clip, update and clear the gradients.

        A norm that is missing (fp16 overflow) or not finite leaves weights and moments untouched.
        """
        scaler = self.grad_scaler()
        # The scale may change in the update; a copy on the device costs no synchronisation.
        scale = None if scaler is None else scaler.scale.clone()
        self.optimizer._current_grad_norm = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.layout.plugin.startswith("gemini"):
            # Gemini leaves this on when fp16 overflows, and adds every later step to the overflow.
            self.optimizer.module.chunk_manager.accumulating_grads = False
        norm = self.optimizer.get_grad_norm()
        return GradientNorm(None if norm is None else float(norm), scale)

    def _guard_optimizer(self) -> None:
        """Skip the inner update when the norm, which every plugin has by then, is not finite.

        ColossalAI checks for overflow in fp16 only; in bf16 and fp32 one NaN gradient would turn
        every weight into NaN.
        """
        inner = self.optimizer.optim
        update = inner.step

        def guarded(*args: Any, **kwargs: Any) -> Any:
            norm = self.optimizer.get_grad_norm()
            if norm is None or math.isfinite(norm):
                return update(*args, **kwargs)
            return None

        inner.step = guarded

    def grad_scaler(self) -> Any:
        """ColossalAI's dynamic loss scaler, or None outside fp16."""
        for attribute in ("mix_precision_mixin", "mixed_precision_mixin", "mixed_precision"):
            mixin = getattr(self.optimizer, attribute, None)
            if mixin is not None:
                return getattr(mixin, "grad_scaler", None)
        return None

    def loss_scale(self) -> float | None:
        scaler = self.grad_scaler()
        return None if scaler is None else float(scaler.scale)

    def reduce_loss(self, share: Tensor) -> float:
        """The step's loss from every rank's share: one all-reduce and one host sync."""
        value = share.detach().float().clone()
        # Tensor-parallel ranks hold the same share; pipeline stages before the last hold zero.
        dist.all_reduce(value)
        return value.item() * self.layout.pp / self.layout.world_size

    # -- forward only --------------------------------------------------------------------------

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()

    def loss_sum(self, batches: list[MicroBatch]) -> Tensor:
        """Summed token losses of these micro-batches over all replicas, on every rank.

        Under a pipeline the micro-batches must have the shape and number of a training step's.
        """
        with self._inference():
            if self.layout.pp > 1:
                total = self._pipeline(batches, weight=1.0)
            else:
                total = torch.zeros((), device=self.device)
                for batch in batches:
                    logits = self.model(**self._inputs(batch)).logits
                    total += self.token_loss_sum(logits, batch.labels.to(self.device))
        dist.all_reduce(total)
        return total / self.layout.tp

    def next_token_logits(self, input_ids: Tensor, position: int) -> Tensor:
        """Logits [vocabulary] after `input_ids[0, position]`, equal on every rank.

        Args:
            input_ids: [rows, length] as a training step has them (causal: what follows `position`
                is padding and changes nothing).
        """
        batch = MicroBatch(input_ids, torch.full_like(input_ids, IGNORED))
        kept: list[Tensor] = []
        part, local = divmod(position, input_ids.shape[1] // self.layout.sequence_axis)

        def keep(logits: Tensor) -> None:
            if not kept:
                kept.append(logits[0, local].float())

        def criterion(outputs: Any, micro_batch: dict[str, Tensor]) -> Tensor:
            keep(outputs.logits)
            return outputs.logits.new_zeros(())

        with self._inference():
            if self.layout.pp == 1:
                keep(self.model(**self._inputs(batch)).logits)
            else:
                self._execute_pipeline([batch], criterion, None)
            if kept and self.layout.tp > 1:
                kept = [self._gather_vocabulary(kept[0])]
        row = kept[0] if kept else torch.empty(self.config.vocab_size, device=self.device)
        if self.layout.pp > 1:
            last = dist.get_global_rank(self.plugin.pp_group, self.layout.pp - 1)
            dist.broadcast(row, last, group=self.plugin.pp_group)
        if self.layout.sequence_axis > 1:
            owner = dist.get_global_rank(self.plugin.sp_group, part)
            dist.broadcast(row, owner, group=self.plugin.sp_group)
        return row

    def _gather_vocabulary(self, row: Tensor) -> Tensor:
        part = padded_vocabulary(self.config.vocab_size, self.layout.tp) // self.layout.tp
        row = F.pad(row, (0, part - row.shape[0]))
        parts = [torch.empty_like(row) for _ in range(self.layout.tp)]
        dist.all_gather(parts, row.contiguous(), group=self.plugin.tp_group)
        return torch.cat(parts)[: self.config.vocab_size]
