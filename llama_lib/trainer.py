"""The only training loop.

Invariant: after step k the run has consumed exactly the samples before its position in the global
order, and stopping there and resuming changes no later number.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from llama_lib import coordination, result_file
from llama_lib.checkpoint.store import TrainerState
from llama_lib.closing import trained_on, what_next
from llama_lib.config import Options
from llama_lib.control import Request, Requests
from llama_lib.data.loader import BatchLoader, Rows, StepRows, rows_hash
from llama_lib.devices import on_device
from llama_lib.engine import Engine, GradientNorm, MicroBatch
from llama_lib.errors import RunError
from llama_lib.evaluate import TOTAL, HeldOut, HeldOutRows, measure
from llama_lib.garbage import Garbage
from llama_lib.layout import BatchPlan
from llama_lib.ledger import LedgerWriter
from llama_lib.measurement import Measurement
from llama_lib.memory_check import STEPS as MEMORY_CHECK_STEPS
from llama_lib.memory_check import MemoryCheck
from llama_lib.metrics import Console, MetricsSink, StepRecord
from llama_lib.nonfinite import NonfiniteSteps
from llama_lib.optim import learning_rate, set_learning_rate
from llama_lib.profile import profiled
from llama_lib.progress import step_done
from llama_lib.result_file import Loss, Result
from llama_lib.run_chat import Chat
from llama_lib.samples import answers, sample_text
from llama_lib.saving import Saver
from llama_lib.summary import closing_lines, headline_memory, peak_memory

logger = logging.getLogger("llama_lib")


class Trainer:
    """Trains one boosted model on one stream of batches.

    Args:
        loader: gives the micro-batches of this rank; its step counts from 0.
        tokenizer: None if the rows are random ids.
        state: where the run stands; step 0 for a fresh one.
        held_out: what `eval_interval` measures, or None.
        chat: what the model is served with after fine-tuning; None in pre-training.
        ledger: where the rows of every step are written down.
        available: tokens of each source in one pass, for the report at the end.
        memory_check: says after some steps how much memory was planned and how much is used.
    """

    def __init__(
        self,
        options: Options,
        engine: Engine,
        plan: BatchPlan,
        loader: BatchLoader,
        tokenizer: Any,
        state: TrainerState,
        held_out: HeldOutRows | None = None,
        chat: Chat | None = None,
        ledger: LedgerWriter | None = None,
        available: dict[str, int] | None = None,
        memory_check: MemoryCheck | None = None,
    ) -> None:
        self.options, self.engine, self.plan, self.loader = options, engine, plan, loader
        self.tokenizer, self.state, self.held_out = tokenizer, state, held_out
        self.chat, self.ledger, self.available = chat, ledger, available or {}
        self.memory_check = memory_check
        self.is_main = dist.get_rank() == 0
        self.nonfinite = NonfiniteSteps(options)
        self.measured: tuple[int, float] | None = None  # step and held-out loss
        self.first_step = state.step + 1
        self.console = Console(plan.num_steps, state.step, self.is_main)
        self.is_benchmark = options.script == "benchmark"
        # Not `typed`: a run's specs.yaml names every folder.
        keeps_records = not self.is_benchmark or "tensorboard_dir" in options.flags
        self.sink = MetricsSink(
            options.report.tensorboard_dir, state.step + 1, self.is_main and keeps_records
        )
        self.measurement = Measurement(engine, plan)
        self.garbage = Garbage()
        end_token_ids = chat.end_token_ids if chat else None
        self.saver = Saver(
            options, engine, plan, loader.source, tokenizer, state, end_token_ids, self.say
        )

    # -- the loop ------------------------------------------------------------------------------

    def fit(self) -> int:
        """Train to the end of the plan, or to an agreed stop.

        Returns:
            Exit code: 0 at the end, 128 + signal after a save on a signal.

        Raises:
            RunError: ten steps in a row were not finite, or a checkpoint could not be saved: the
                last one, one beside the training, or that of the trial.
        """
        checkpoint = self.options.checkpoint
        requests = Requests(checkpoint.save_dir, saves=checkpoint.save_interval is not None)
        request = Request()
        batches = self.loader.steps(self.state.step, self.plan.num_steps)
        try:
            with self.garbage.between_steps(), self.measurement.of_steps() as self.watch:
                self._make_up_for_measuring()
                with profiled(self.options, self.state.step, self.say) as step_is_done:
                    for rows in batches:
                        requests.ask(self.saver.has_failed)
                        self.train_step(rows)
                        self.garbage.step_done()
                        step_is_done()
                        request = requests.answer()
                        self.after_step(request)
                        self.watch.ends("other")
                        if request.leave:
                            break
                    self.measurement.ends()
                # Only now: a profiler within another one ends its trace.
                if self.measurement.needs_profile and not request.leave:
                    self.measurement.profile(self._micro_batches(rows), rows.num_labels or 1)
        finally:
            batches.close()
            self.loader.close()
            if self.ledger is not None:
                self.ledger.close()
            requests.close()
            self.saver.close()
            self.console.close()
            self.sink.close()
        self._finish(request)
        return 128 + request.signal_number if request.signal_number else 0

    def train_step(self, rows: StepRows) -> None:
        step = self.state.step + 1
        batches = self._micro_batches(rows)
        self.watch.ends("data")
        if step == self.first_step:
            self._check_replicas(rows)
        lr = learning_rate(
            step, self.plan.num_steps, self.plan.warmup_steps, self.options.training.lr
        )
        set_learning_rate(self.engine.optimizer, lr)
        loss = self.engine.forward_backward(batches, rows.num_labels or 1).detach()
        self.watch.ends("forward_backward")
        grad_norm = self.engine.step()
        self.watch.step_done(self.loader.data_wait)
        self._advance(rows)
        step_done(step)
        if step == self.first_step:
            self.first_loss = loss
        self.last_loss = loss
        if trouble := self.nonfinite.check(step, grad_norm, rows.samples, self.loader.source):
            self.say(trouble)
        if self._is_logged(step):
            logger.info("step %d batch %s", step, rows_hash(rows))
            # The one place where the loop waits for the device on its own account.
            self._record(step, self.engine.reduce_loss(loss), lr, grad_norm)

    def _micro_batches(self, rows: StepRows) -> list[MicroBatch]:
        return [self._micro_batch(part) for part in rows.micro_batches]

    def _micro_batch(self, rows: Rows) -> MicroBatch:
        # The engine turns the documents into what its kernel takes before it copies anything.
        documents = None if rows.documents is None else torch.from_numpy(rows.documents)
        ids = on_device(torch.from_numpy(rows.ids), self.engine.device)
        # Rows without padding and masks are their own labels: one copy to the device, not two.
        labels = ids
        if rows.labels is not rows.ids:
            labels = on_device(torch.from_numpy(rows.labels), self.engine.device)
        weights = None
        if rows.weights is not None:
            weights = on_device(torch.from_numpy(rows.weights), self.engine.device)
        return MicroBatch(ids, labels, documents, weights)

    def _advance(self, rows: StepRows) -> None:
        self.state.step += 1
        self.state.samples += self.plan.global_batch
        self.state.tokens += self.plan.tokens_per_step
        self.state.next_sample = self.loader.position.next_sample(
            self.state.step, self.plan.global_batch
        )
        for source, tokens in rows.tokens.items():
            self.saver.consumed[source] = self.saver.consumed.get(source, 0) + tokens
        if self.is_main and self.ledger is not None:
            place = self.loader.source.state(rows.samples[0])
            if place:
                self.ledger.stream_step(self.state.step, place)
        self.console.advance()

    @contextlib.contextmanager
    def _paused(self, phase: str) -> Iterator[None]:
        """What is no training: `phase` is what its time is counted as."""
        with self.watch.paused(phase), self.garbage.as_usual():
            yield

    def after_step(self, request: Request) -> None:
        """Evaluate, sample and save where the step or a request asks for it."""
        step, last = self.state.step, self.state.step == self.plan.num_steps
        interval = self.options.checkpoint.save_interval
        if request.failed:
            self.saver.fail()
        self.saver.step_done()
        if self.memory_check is not None and step == self.first_step + MEMORY_CHECK_STEPS - 1:
            with self._paused("other"):
                self.say(self.memory_check.line(max(coordination.gather(self.memory_check.used()))))
        if request.leave:
            # Whoever asks a run to end may kill it within seconds: nothing comes before the save.
            if interval is not None:
                with self._paused("save"):
                    self.saver.save(self.measured, is_last=True)
            return
        if step == self.first_step and not last and self.saver.checks:
            with self._paused("save"):
                self.saver.check()
        saves = request.save or (interval is not None and (last or step % interval == 0))
        if self._is_measured(step, last, saves):
            with self._paused("other"):
                self._evaluate()
        if self._is_sampled(step, last):
            with self._paused("other"):
                self._show_samples(step)
        if saves:
            with self._paused("save"):
                self.saver.save(self.measured, is_last=last)

    def _is_sampled(self, step: int, last: bool) -> bool:
        interval = self.options.report.sample_interval
        at_the_end = last and self.chat is not None and bool(self.chat.prompts)
        return at_the_end or (interval > 0 and step % interval == 0)

    def _is_measured(self, step: int, last: bool, saves: bool) -> bool:
        """At every --eval_interval and at the end; in fine-tuning at every checkpoint too, of which
        the best is kept."""
        if self.held_out is None:
            return False
        if self.chat is not None and saves:
            return True
        interval = self.options.report.eval_interval
        return interval > 0 and (step % interval == 0 or last)

    def _make_up_for_measuring(self) -> None:
        """A run that was asked to end at a step saved it and left out measuring it."""
        step = self.state.step
        if step == 0 or not self._is_measured(step, last=False, saves=False):
            return
        if coordination.from_rank_0(self.sink.has_eval(step)):
            return
        if self.engine.layout.plugin == "gemini_auto":
            # Its first forward pass has to be one of training: that is how it learns what to move.
            self.say(f"held-out loss at step {step}: left out, gemini_auto cannot make up for it")
            return
        with self._paused("other"):
            self._evaluate()

    # -- what a step leaves behind ---------------------------------------------------------------

    def _is_logged(self, step: int) -> bool:
        return (
            step % self.options.report.log_interval == 0
            or step == self.plan.num_steps
            or (step == 1 and self.options.model.model_path is not None)
        )

    def _record(self, step: int, loss: float, lr: float, norm: GradientNorm) -> None:
        window = self.watch.window()
        samples_per_second = window.steps * self.plan.global_batch / window.seconds
        tokens_per_second = samples_per_second * self.plan.max_length
        memory = peak_memory(self.engine.device)
        throughput = self.measurement.throughput
        tflops = throughput.tflops_per_gpu(tokens_per_second)["model"]
        record = StepRecord(
            step=step,
            tokens=self.state.tokens,
            loss=loss,
            lr=lr,
            grad_norm=norm.value,
            tokens_per_second=tokens_per_second,
            samples_per_second=samples_per_second,
            tflops_per_gpu=tflops,
            mfu=throughput.mfu(tflops),
            memory_mb=headline_memory(memory),
            data_wait_s=window.data_wait / window.steps,
            step_time_s=window.seconds / window.steps,
            loss_scale=norm.loss_scale,
        )
        self.state.loss = loss
        if step == 1:
            self._check_first_loss(loss)
        if step % self.options.report.log_interval == 0 or step == self.plan.num_steps:
            self.sink.log(record)
            self.console.log(record)
            logger.info("step %d loss %.6f lr %.3e grad_norm %s", step, loss, lr, norm.value)

    def _check_first_loss(self, loss: float) -> None:
        bound = math.log(self.engine.config.vocab_size) - 1
        if self.options.model.model_path and self.tokenizer is not None and loss > bound:
            self.say(
                f"warning: the first loss {loss:.2f} looks like random weights (ln of the "
                f"vocabulary - 1 = {bound:.2f}) although every tensor of --model_path was loaded "
                "and compared: is this the tokenizer the model was trained with?"
            )

    def _check_replicas(self, rows: StepRows) -> None:
        """Ranks of one model replica must see one batch, replicas different ones."""
        by_replica: dict[int, set[str]] = {}
        for replica, digest in coordination.gather((self.engine.dp_rank, rows_hash(rows))):
            by_replica.setdefault(replica, set()).add(digest)
        torn = [replica for replica, digests in by_replica.items() if len(digests) > 1]
        if torn or len(by_replica) != self.engine.layout.dp:
            raise RunError(
                f"ranks of one model replica read different batches (replicas {torn}); "
                "are the prepared datasets of all hosts the same?"
            )

    # -- evaluation and the end --------------------------------------------------------------------

    def _evaluate(self) -> None:
        assert self.held_out is not None
        found = measure(self.engine, self.held_out, self.plan, self.options.report.eval_steps)
        self.sink.log_eval(self.state.step, found)
        shown = "  ".join(f"{name} {value.loss:.4f}" for name, value in found.items())
        if isinstance(self.held_out, HeldOut):
            if self.is_main:
                shown += f"  (unigram entropy {self.held_out.entropy:.4f})"
        elif found:
            shown += f"  token accuracy {found[TOTAL].accuracy:.1%}"
        self.say(f"held-out loss at step {self.state.step}: {shown}")
        self.measured = (self.state.step, found[TOTAL].loss) if found else None

    def _show_samples(self, step: int) -> None:
        if self.chat is None:
            text = sample_text(self.engine, self.tokenizer, self.held_out, self.plan, step)
            self.say(f"sample at step {step}: {text!r}")
            return
        prompts = self.chat.prompts
        found = answers(self.engine, self.tokenizer, prompts, self.plan, self.chat.end_token_ids)
        for prompt, answer in zip(prompts, found, strict=True):
            self.say(f"asked at step {step}: {prompt!r} -> {answer!r}")

    def _finish(self, request: Request) -> None:
        if request.leave:
            self.say(f"stopped after step {self.state.step} as asked")
        if not self.is_benchmark:
            is_chat = self.chat is not None
            self._say_all(trained_on(self.state, self.loader.source, self.available))
            self._say_all(what_next(self.options, self.state, self.saver.saved_step, is_chat))
        first, last = (self.engine.reduce_loss(loss) for loss in (self.first_loss, self.last_loss))
        result = self.measurement.result(Loss(first, last))
        lost = self._write_result(result)
        self._say_all(closing_lines(result))
        if lost is not None:
            raise lost

    def _write_result(self, result: Result) -> RunError | None:
        """Leaves the file of a benchmark; what is wrong with it is to be raised after the table."""
        output, steps = self.options.report.output, self.plan.num_steps
        if output is None:
            return None
        if self.state.step < steps:
            self.say(
                f"--output {output} is not written: {self.state.step} of {steps} steps were run"
            )
        elif self.is_main:
            try:
                result_file.write(result, output)
            except OSError as error:
                return RunError(f"--output {output} could not be written ({error.strerror}).")
            self.say(f"result: {output}")
        return None

    def _say_all(self, lines: list[str]) -> None:
        for line in lines:
            self.say(line)

    def say(self, text: str) -> None:
        """One line on the console of rank 0 and in every rank's log file."""
        logger.info("%s", text)
        self.console.write(text)
