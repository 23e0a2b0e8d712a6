"""When a run is saved and how: at once, or beside the training (--async_save).

Invariant: at most one checkpoint is being written; every rank decides alike, and a checkpoint that
is said to be saved is complete on the disk.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama_lib import coordination
from llama_lib.checkpoint import store, writing
from llama_lib.checkpoint.background import Background
from llama_lib.checkpoint.manifest import Manifest, step_directory, whole_checkpoints
from llama_lib.checkpoint.staging import HostMemory, Staged
from llama_lib.checkpoint.state import held_state
from llama_lib.checkpoint.store import TrainerState
from llama_lib.checkpoint.verify import tensor_problems
from llama_lib.checkpoint.writing import CHECK_NAME, Draft, Live
from llama_lib.config import Options
from llama_lib.data.loader import RowSource
from llama_lib.engine import Engine
from llama_lib.errors import JobError, RunError
from llama_lib.layout import BatchPlan
from llama_lib.ledger import tokens_by_source

logger = logging.getLogger("llama_lib")

# From here on a save that fails after days costs more than a trial (issue 6).
CHECKED_PARAMETERS = 10e9
# A run that ends in an error waits so long for the checkpoint under way: other ranks may be gone,
# and whoever ended the run may be about to kill it. Chosen.
CLOSING_SECONDS = 60.0
# How often ranks that wait for the writers ask each other (chosen).
SETTLE_SECONDS = 0.2


class Saver:
    """Saves one run.

    Args:
        state: of the run, which the trainer advances.
        source: of the rows, which knows where a sample lies.
        end_token_ids: ids at which generation stops; None: this is no fine-tuning, and no
            checkpoint is the best.
        say: shows a line; called on every rank.

    Attributes:
        consumed: training tokens of this replica's rows, by source; the trainer counts them.
        saved_step: of the newest checkpoint that is complete, None if there is none yet.
    """

    def __init__(
        self,
        options: Options,
        engine: Engine,
        plan: BatchPlan,
        source: RowSource,
        tokenizer: Any,
        state: TrainerState,
        end_token_ids: list[int] | None,
        say: Callable[[str], None],
    ) -> None:
        self.options, self.engine, self.plan, self.source = options, engine, plan, source
        self.tokenizer, self.state, self.end_token_ids = tokenizer, state, end_token_ids
        self.say = say
        self.consumed: dict[str, int] = {}
        self._consumed_before = dict(state.consumed)
        self.saved_step = state.step if state.step else None
        self._first_step = state.step
        self._background: Background | None = None
        self._memory: HostMemory | None = None
        if options.checkpoint.async_save and options.checkpoint.save_interval is not None:
            self._background, self._memory = Background(), HostMemory(engine.device)
            if problem := self._memory.take(held_state(engine)):
                say(f"--async_save: {problem}: until there is, training waits for each checkpoint")
        # The step that was begun last, on every rank until all know that it is written.
        self._latest: int | None = None
        # Step, and seconds the loop stood still for it, until this rank knows that it is written.
        self._under_way: tuple[int, float] | None = None
        self._patience = CLOSING_SECONDS

    # -- what the loop asks for --------------------------------------------------------------

    def save(self, measured: tuple[int, float] | None, is_last: bool) -> None:
        """Save the present step; called by all ranks.

        Args:
            measured: the latest measured step and its held-out loss.
            is_last: no training follows: what is under way is waited for, nothing is staged, and
                a failure ends the run.

        Raises:
            JobError: on every rank.
        """
        begin = time.perf_counter()
        self._wait_for_writer()
        if self.saved_step == self.state.step:
            return
        best = self.state.best
        self._complete_state(measured)
        try:
            if is_last or not self._save_beside(begin):
                draft = self._begin()
                writing.finish(draft, Live(self.engine))
                self.saved_step = self.state.step
                self.say(f"saved {draft.final}")
        except RunError as error:
            if is_last:
                raise self._end(f"the last save failed: {error}") from None
            self.state.best = best
            # A full disk now may have room at the next interval: losing the run helps nobody.
            self.say(f"warning: {error} Training goes on; the next save is tried as planned.")
        # In this form benchmarks/saving.py reads it.
        logger.info("save of step %d: %.4f s", self.state.step, time.perf_counter() - begin)

    def step_done(self) -> None:
        """Say what has been written meanwhile."""
        if self._background is None or self._under_way is None or self._background.is_busy:
            return
        if self._background.failure is None:
            step, waited = self._under_way
            self._under_way, self.saved_step = None, step
            self.say(
                f"saved {step_directory(self.options.checkpoint.save_dir, step)} beside the "
                f"training in {self._background.seconds:.1f} s; the loop waited {waited:.2f} s"
            )

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that writing beside the training has failed."""
        return self._background is not None and self._background.failure is not None

    def fail(self) -> None:
        """End the run, on every rank with the words of the first one that failed.

        Called by all ranks once one of them has failed; others may not know yet.
        """
        raise self._end(self._failure())

    def _failure(self) -> str:
        """What went wrong beside the training: the words of the first rank that failed."""
        assert self._background is not None
        failures = coordination.gather(self._background.failure)
        self._patience = 0.0  # where others failed, this rank's thread may wait for them in vain
        return f"--async_save: {next(filter(None, failures))}"

    def _end(self, problem: str) -> JobError:
        """The end of the run that could not be saved: what is left of it, and how to go on."""
        checkpoint, step = self.options.checkpoint, self.state.step
        try:
            whole = whole_checkpoints(checkpoint.save_dir)
        except OSError as error:
            return JobError(f"{problem} {checkpoint.save_dir} cannot be read either: {error}.")
        begin = int(whole[0].name.removeprefix("step-")) if whole else self._first_step
        if whole:
            left = f"The newest whole checkpoint is {whole[0]}: {step - begin} step(s) since then"
            then = "the same command with --load auto goes on from there"
        else:
            left = f"No whole checkpoint is in {checkpoint.save_dir}: {step - begin} step(s)"
            then = "start the same command again"
        room = "" if checkpoint.keep_last == 1 else "; --keep_last N keeps the newest N only"
        return JobError(
            f"{problem.rstrip('.')}. {left} are lost. Once that is mended (a full disk: free space"
            f"{room}), {then}."
        )

    def close(self) -> None:
        """The loop has ended, perhaps in an error: finish what is under way, with some patience."""
        if self._background is not None:
            self._background.wait(self._patience)

    # -- beside the training -----------------------------------------------------------------

    def _wait_for_writer(self) -> None:
        """Wait for the checkpoint under way, which comes first."""
        if self._background is None or self._latest is None:
            return
        begin = time.perf_counter()
        # Also where this rank's thread has ended: all ranks have to ask each other alike.
        try:
            if self._settle(f"waiting until the checkpoint of step {self._latest} is written"):
                self.say(f"waited {time.perf_counter() - begin:.1f} s for it")
        except RunError as error:
            raise self._end(str(error)) from None
        self._latest = None
        self.step_done()

    def _settle(self, waiting: str | None = None) -> bool:
        """Wait until no rank writes any more; whether one did. A failure of any rank is raised.

        All ranks decide on what all of them know: where one has failed by itself, the others would
        wait for it in their threads.
        """
        assert self._background is not None
        was_busy = False
        while True:
            ranks = coordination.gather((self._background.is_busy, self.has_failed))
            if any(has_failed for _, has_failed in ranks):
                raise RunError(self._failure())
            if not any(is_busy for is_busy, _ in ranks):
                return was_busy
            if waiting and not was_busy:
                self.say(waiting)
            was_busy = True
            self._background.wait(SETTLE_SECONDS)

    def _save_beside(self, begin: float) -> bool:
        """Let the present step be written beside the training; False: that is not possible here."""
        if not self._begin_beside():
            return False
        self._latest = self.state.step
        self._under_way = (self.state.step, time.perf_counter() - begin)
        return True

    def _begin_beside(self, is_check: bool = False) -> bool:
        """Copy the present state and let it be written; False: that is not possible here."""
        if self._background is None or self._memory is None:
            return False
        held = held_state(self.engine)
        if problem := self._memory.take(held):
            self.say(f"--async_save: {problem}: this checkpoint is written while training waits")
            return False
        draft, group = self._begin(is_check), self._background.group
        staged = Staged(self.engine, self._memory, held, group)
        self._background.start(lambda: writing.finish(draft, staged, group))
        return True

    # -- what is saved -----------------------------------------------------------------------

    def _begin(self, is_check: bool = False) -> Draft:
        checkpoint = self.options.checkpoint
        return store.begin(
            self.engine,
            self.state,
            self.tokenizer,
            checkpoint.save_dir,
            checkpoint.keep_last,
            self.end_token_ids,
            is_check,
        )

    def _complete_state(self, measured: tuple[int, float] | None) -> None:
        """Bring the state up to the present step where the trainer does not do so itself."""
        state, sample = self.state, self.state.position.sample
        state.scaler = store.scaler_state(self.engine)
        state.loss_scale = self.engine.loss_scale()
        state.epoch, state.stream = self.source.epoch_of(sample), self.source.state(sample)
        state.consumed = tokens_by_source(
            coordination.gather((self.engine.dp_rank, self.consumed)), self._consumed_before
        )
        state.schedule = {
            "kind": "linear warm-up, cosine to 10%",
            "lr": self.options.training.lr,
            "warmup_steps": self.plan.warmup_steps,
            "num_steps": self.plan.num_steps,
            "last_step": state.step,
        }
        state.options = self.options.to_dict()
        state.best = self._best(measured)

    def _best(self, measured: tuple[int, float] | None) -> dict[str, Any] | None:
        """The best checkpoint when the present step is saved."""
        best = self.state.best
        if self.end_token_ids is None or measured is None or measured[0] != self.state.step:
            return best
        loss = measured[1]
        if not math.isfinite(loss) or (best is not None and loss >= best["loss"]):
            return best
        # Rows of each source that are measured at most: losses of others are not comparable.
        rows = self.options.report.eval_steps * self.plan.global_batch
        return {"step": self.state.step, "loss": loss, "rows": rows}

    # -- the trial after the first step ------------------------------------------------------

    @property
    def checks(self) -> bool:
        """Whether a checkpoint is to be tried after the first step."""
        checkpoint = self.options.checkpoint
        if checkpoint.save_interval is None:
            return False
        if checkpoint.save_check is not None:
            return checkpoint.save_check
        world = self.engine.layout.world_size
        several_hosts = world > int(os.environ.get("LOCAL_WORLD_SIZE", world))
        parameters = sum(map(math.prod, self.engine.shapes.values()))
        return several_hosts or parameters > CHECKED_PARAMETERS

    def check(self) -> None:
        """Write a whole checkpoint as the run is going to, read it again, and remove it.

        Raises:
            RunError: on every rank; nothing is left of it.
        """
        path, begin = Path(self.options.checkpoint.save_dir) / CHECK_NAME, time.perf_counter()
        self._complete_state(None)
        try:
            self._write_check()
            written = time.perf_counter()
            problems, size = self._read_check(path)
            if problems:
                raise RunError(f"what was written reads otherwise: {'; '.join(problems[:3])}.")
        except RunError as error:
            raise JobError(
                f"--save_check: {error} This run could not be saved there. Give --save_dir a "
                "directory that can take a checkpoint, or go on without the check: "
                "--no-save_check."
            ) from None
        finally:  # nobody reads any more, whatever has happened
            if dist.get_rank() == 0:
                shutil.rmtree(path, ignore_errors=True)
        self.say(
            f"save check: a checkpoint of {size / 2**20:,.1f} MB was written in "
            f"{written - begin:.1f} s, read again in {time.perf_counter() - written:.1f} s, and "
            "removed"
        )

    def _write_check(self) -> None:
        if self._begin_beside(is_check=True):
            self._settle()
        else:
            writing.finish(self._begin(is_check=True), Live(self.engine))

    @staticmethod
    def _read_check(path: Path) -> tuple[list[str], int]:
        """Problems of what was written and its bytes, the same on every rank."""
        problems, size = store.verify_distributed(path), 0
        if not problems and dist.get_rank() == 0:
            try:
                size = sum(record.size for record in Manifest.read(path).files.values())
                problems = tensor_problems(path)
            except Exception as error:  # the other ranks wait for the answer
                problems = [f"{type(error).__name__}: {error}"]
        return coordination.from_rank_0((problems, size))
