"""One boosted model: the same forward-backward, step and forward-only calls for every plugin.

Invariant: the gradient is that of the mean loss over all label tokens of the global batch, each
counted with its weight, whatever the plugin, the layout, the accumulation and the micro-batches;
nothing non-finite reaches a weight.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_lib.attention import flash_kernel, use_flash_attention
from llama_lib.chunked_loss import ChunkedHead, linear_cross_entropy, linear_score
from llama_lib.config import Options
from llama_lib.criterion import IGNORED, Criterion
from llama_lib.devices import on_device
from llama_lib.document_attention import (
    KERNELS,
    document_kernel,
    document_positions,
    use_document_attention,
)
from llama_lib.initial_model import build_model, restore_rotary_frequencies
from llama_lib.layout import Layout
from llama_lib.lora import add_adapters, file_name
from llama_lib.model_kernels import compile_layers, use_kernels
from llama_lib.optim import build_optimizer, parameter_names
from llama_lib.planner.job import loss_is_chunked
from llama_lib.plugins import Setting, build_plugin, data_parallel_rank, supports_lazy_init
from llama_lib.progress import made
from llama_lib.recompute import use_recompute

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class MicroBatch:
    """Rows of one forward pass: `input_ids` and `labels` [rows, length], labels -100 = no loss.

    `documents` [rows, length] numbers the documents of each row in their order; tokens then attend
    within their own document only. Without it attention is causal over the whole row.
    `weights` fp32 [rows, length] say what the label in the same place counts in the loss (0: as if
    it were -100). Without it every label counts one.
    """

    input_ids: Tensor
    labels: Tensor
    documents: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class Score:
    """What the model makes of some rows, all replicas together.

    `loss_sum` adds up the token losses in nats, each times its weight. Of the `labels` tokens that
    have a weight above 0 the model's likeliest token is right for `correct`.
    """

    loss_sum: float
    correct: int
    labels: int


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


class Engine:
    """A boosted model and optimizer with the calls the training loop needs.

    Attributes:
        names: names of the trained parameters in the optimizer's order (its parameter ids).
        trained: full shape of every trained parameter by name; adapters have the names of peft's
            files, everything else those of plain transformers.
        shapes: full shape of every parameter of the whole model by its name in transformers.
        module: the model inside the wrappers; its adapters and what they wrap are told apart by
            `llama_lib.lora`.
        dp_rank: which replica this process belongs to.
        attention: the kernel of attention.
        kernels: what computes norms, rotary embedding and SwiGLU.
        chunked_loss: logits and loss are computed a piece at a time.
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
        adapted = options.model.lora_rank > 0
        # Layouts that take adapters hold the whole model anyway.
        lazy = supports_lazy_init(layout) and not adapted
        model = build_model(config, self.dtype, options.training.seed, device, lazy)
        self.attention = str(model.config._attn_implementation)
        if options.model.flash_attention:
            self.attention = flash_kernel()
            if layout.plugin != "hybrid_parallel":
                use_flash_attention(model)
        if options.model.document_mask:
            self.attention = document_kernel(device, self.dtype)
            self._document_mask = KERNELS[self.attention]
            use_document_attention(model)
        self.kernels = use_kernels(
            model,
            options.model.kernels,
            device,
            layout,
            compiled=options.model.compile,
            flash=options.model.flash_attention,
        )
        use_recompute(model, options.recompute)
        if options.model.compile:
            compile_layers(model)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if adapted:
            model = add_adapters(self.booster, model, options, self.dtype)
        optimizer = build_optimizer(model, options.training.lr, options.training.weight_decay)
        self.names = [file_name(name) for name in parameter_names(model, optimizer)]
        trained = (pair for pair in model.named_parameters() if pair[1].requires_grad)
        self.trained = {file_name(name): tuple(p.shape) for name, p in trained}
        made()
        self.model, self.optimizer, *_ = self.booster.boost(model, optimizer)
        made()
        if adapted:
            self.module = self.model.unwrap(unwrap_peft=False).get_base_model()
        else:
            self.module = self.model.unwrap()
        restore_rotary_frequencies(self.module, device)
        self.dp_rank = data_parallel_rank(self.plugin, layout)
        rows = options.training.batch_size * accumulation
        self.num_micro_batches = rows // (options.parallel.microbatch_size or 1)
        self.is_last_stage = layout.pp == 1 or self.plugin.stage_manager.is_last_stage(
            ignore_chunk=True  # of several chunks the answer would depend on the present one
        )
        self._masks: dict[tuple[int, int], Tensor] = {}
        self.criterion = Criterion(layout, self.plugin, config.vocab_size)
        self.chunked_loss = loss_is_chunked(options, layout)
        self._head = None
        if self.chunked_loss:
            self._head = ChunkedHead(self.module.lm_head, config.vocab_size)
        self._guard_optimizer()

    # -- inputs ------------------------------------------------------------------------------

    def describe_kernels(self) -> str:
        loss = "a piece of the logits at a time" if self.chunked_loss else "all logits at once"
        return (
            f"kernels: attention {self.attention}; norms, rotary embedding and SwiGLU "
            f"{self.kernels}; loss from {loss}; recompute {self.options.recompute}"
        )

    def _inputs(self, batch: MicroBatch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(self.device, non_blocking=True)}
        if self.layout.sp_mode is not None and not self.options.model.flash_attention:
            # Without an explicit mask ColossalAI's sequence-parallel attention is not causal.
            inputs["attention_mask"] = self._causal_mask(*batch.input_ids.shape)
        if batch.documents is not None:
            self._require_document_mask()
            inputs["attention_mask"] = self._document_mask(batch.documents, self.device)
            documents = on_device(batch.documents, self.device)
            inputs["position_ids"] = document_positions(documents)
        return inputs

    def _require_document_mask(self) -> None:
        assert self.options.model.document_mask, "the model was built without --document_mask"

    def _causal_mask(self, rows: int, length: int) -> Tensor:
        """Additive mask [rows, 1, length, length] in the working precision."""
        if (rows, length) not in self._masks:
            lowest = torch.finfo(self.dtype).min
            mask = torch.full((length, length), lowest, dtype=self.dtype, device=self.device)
            self._masks = {(rows, length): mask.triu(1).expand(rows, 1, length, length)}
        return self._masks[rows, length]

    # -- training ----------------------------------------------------------------------------

    def forward_backward(self, batches: list[MicroBatch], num_labels: float) -> Tensor:
        """Accumulate the gradient of the global mean loss over this rank's micro-batches.

        Args:
            num_labels: label tokens of the whole global batch, all ranks together, each with its
                weight.

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
                loss = self._loss_sum(batch, weight) * weight
                self.booster.backward(loss, self.optimizer)
                share += loss.detach()
            made()
        return share

    def _loss_sum(self, batch: MicroBatch, weight: float) -> Tensor:
        """Sum of the token losses of a forward pass, to be multiplied with `weight`."""
        if self._head is None:
            logits = self.model(**self._inputs(batch)).logits
            return self.criterion.loss_sum(logits, batch.labels, batch.weights)
        scaler = self.grad_scaler()
        scale = weight if scaler is None else weight * scaler.scale
        targets, counts = self.criterion.targets(self.device, batch.labels, batch.weights)

        def task(hidden: Tensor, head: Tensor) -> Tensor:
            return linear_cross_entropy(hidden, head, targets, counts, scale)

        with self._head.asked_for(task):
            return self.model(**self._inputs(batch)).logits

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Hold back the gradient exchange until the last micro-step where the plugin can."""
        if last or self.layout.plugin != "hybrid_parallel" or self.layout.zero_stage == 2:
            return contextlib.nullcontext()
        return self.booster.no_sync(self.model, self.optimizer)

    def _pipeline(self, batches: list[MicroBatch], weight: float) -> Tensor:
        # The schedule divides every micro-batch's loss by their number.
        scaled = weight * self.num_micro_batches

        def criterion(outputs: Any, micro_batch: dict[str, Tensor]) -> Tensor:
            labels, weights = micro_batch["targets"], micro_batch.get("weights")
            return self.criterion.loss_sum(outputs.logits, labels, weights) * scaled

        return self._execute_pipeline(batches, criterion, self.optimizer)

    def _execute_pipeline(
        self,
        batches: list[MicroBatch],
        criterion: Callable[[Any, dict[str, Tensor]], Tensor],
        optimizer: Any,
    ) -> Tensor:
        """Run the schedule over all rows; the mean criterion, zero before the last stage."""
        rows = {
            "input_ids": torch.cat([b.input_ids for b in batches]),
            # Named "targets": under "labels" the model would compute a loss of its own.
            "targets": torch.cat([b.labels for b in batches]),
        }
        if weights := [b.weights for b in batches if b.weights is not None]:
            rows["weights"] = torch.cat(weights)
        if documents := [b.documents for b in batches if b.documents is not None]:
            self._require_document_mask()
            # Every stage makes the mask of each micro-batch from its documents.
            rows["attention_mask"] = torch.cat(documents)
            rows["position_ids"] = document_positions(rows["attention_mask"])
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

    def score(self, batches: list[MicroBatch]) -> Score:
        """Loss and correct guesses of these micro-batches over all replicas, on every rank.

        Under a pipeline the micro-batches must have the shape and number of a training step's.
        """
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)

        def criterion(outputs: Any, micro_batch: dict[str, Tensor]) -> Tensor:
            labels, weights = micro_batch["targets"], micro_batch.get("weights")
            totals.add_(self.criterion.score(outputs.logits, labels, weights))
            return outputs.logits.new_zeros(())

        with self._inference():
            if self.layout.pp > 1:
                self._execute_pipeline(batches, criterion, None)
            else:
                for batch in batches:
                    totals += self._score(batch)
                    made()
        # Pipeline stages before the last hold zero, tensor-parallel ranks the same.
        dist.all_reduce(totals)
        loss_sum, correct, labels = (totals / self.layout.tp).tolist()
        return Score(loss_sum, round(correct), round(labels))

    def _score(self, batch: MicroBatch) -> Tensor:
        """What `Criterion.score` says of one forward pass."""
        if self._head is None:
            logits = self.model(**self._inputs(batch)).logits
            return self.criterion.score(logits, batch.labels, batch.weights)
        targets, counts = self.criterion.targets(self.device, batch.labels, batch.weights)
        with self._head.asked_for(lambda hidden, head: linear_score(hidden, head, targets, counts)):
            return self.model(**self._inputs(batch)).logits

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
                kept = [self.criterion.whole_vocabulary(kept[0])]
        row = kept[0] if kept else torch.empty(self.config.vocab_size, device=self.device)
        if self.layout.pp > 1:
            last = dist.get_global_rank(self.plugin.pp_group, self.layout.pp - 1)
            dist.broadcast(row, last, group=self.plugin.pp_group)
        if self.layout.sequence_axis > 1:
            owner = dist.get_global_rank(self.plugin.sp_group, part)
            dist.broadcast(row, owner, group=self.plugin.sp_group)
        return row
