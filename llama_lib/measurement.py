"""What a run measures of itself: its steps on a watch, a profiled one after them, one result.

Invariant: nothing that is done in order to measure is in a number but the one it is done for.
"""

import contextlib
from collections.abc import Iterator

from llama_lib.communication import (
    exposed_seconds,
    waiting_timed,
    waits_in_python,
    with_communication,
)
from llama_lib.engine import Engine, MicroBatch
from llama_lib.layout import BatchPlan
from llama_lib.result_file import Loss, Result
from llama_lib.summary import mean_of_ranks, peak_memory, summarise, throughput_of, time_shares
from llama_lib.timing import Stopwatch


class Measurement:
    """Measures the steps of one call of `Trainer.fit`.

    Attributes:
        throughput: the rates of what the engine trains.
        needs_profile: how long steps communicate is known after `profile` only.
    """

    def __init__(self, engine: Engine, plan: BatchPlan) -> None:
        self._engine, self._plan = engine, plan
        self._is_benchmark = engine.options.script == "benchmark"
        self.throughput = throughput_of(engine, plan.max_length)
        several, on_gpus = engine.layout.world_size > 1, engine.device.type == "cuda"
        self.needs_profile = self._is_benchmark and several and on_gpus
        self._hears_waiting = several and not on_gpus and waits_in_python(engine.model)
        self._communication_known = self._hears_waiting or not several
        self._exposed: dict[str, float] | None = None  # seconds of NCCL in a step, by phase

    @contextlib.contextmanager
    def of_steps(self) -> Iterator[Stopwatch]:
        """Yields a running watch; on a CPU it hears of the waiting for other processes."""
        ignored = self._engine.options.report.ignore_steps if self._is_benchmark else 1
        with waiting_timed(self._hears_waiting) as waited:
            self._watch = Stopwatch(self._engine.device, ignored, waited)
            yield self._watch

    def ends(self) -> None:
        """Reads what the steps took; called by all ranks, before anything else is done."""
        self._watch.finish()
        self._memory = peak_memory(self._engine.device)

    def profile(self, batches: list[MicroBatch], num_labels: float) -> None:
        """Do more steps, to see how long one waits for NCCL; called by all ranks."""
        self._exposed = exposed_seconds(
            {
                "forward_backward": lambda: self._engine.forward_backward(batches, num_labels),
                "optimizer": self._engine.step,
            }
        )

    def result(self, loss: Loss) -> Result:
        """What was measured; called by all ranks, after `ends`."""
        phases = mean_of_ranks(self._watch.phases)
        if self._exposed is not None:
            phases = with_communication(phases, self._exposed, len(self._watch.seconds))
        return summarise(
            self._engine,
            self._plan,
            self.throughput,
            self._watch,
            time_shares(phases, self._communication_known or self._exposed is not None),
            self._memory,
            loss,
        )
