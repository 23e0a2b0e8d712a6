"""Steps whose gradients are not finite: skipped, counted, and at some point the end of a run.

Invariant: no such step has changed the weights; naming the documents that were in it moves no
data of the steps after it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llama_lib.checkpoint.manifest import step_directories
from llama_lib.config import Options
from llama_lib.data.loader import RowSource
from llama_lib.data.training_data import Passage
from llama_lib.engine import GradientNorm
from llama_lib.errors import JobError, LlamaLibError

# One bad batch or a loss scale still settling is normal; ten in a row never recovered by itself in
# the reports of users whose runs went on with NaN weights for hours.
MAX_NONFINITE_STEPS = 10

# Documents that a message names; `inspect` shows the rest.
NAMED_DOCUMENTS = 3

Passages = Callable[[Sequence[int], dict[str, Any]], list[list[Passage]]]


class NonfiniteSteps:
    """Counts those in a row.

    Attributes:
        passages: the documents of samples, see `TrainingData`; None: they are not named.
    """

    def __init__(self, options: Options, passages: Passages | None = None) -> None:
        self.options, self.passages = options, passages
        self._in_a_row = 0

    def check(
        self, step: int, norm: GradientNorm, samples: Sequence[int], source: RowSource
    ) -> str | None:
        """What to say about the gradient norm of a step, which ColossalAI has on the host already.

        Args:
            samples: those of the step's global batch.
            source: where its rows came from.

        Raises:
            JobError: it is the tenth step in a row that is not finite.
        """
        if norm.is_finite:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        cause = (
            f"gradients overflow at loss scale {norm.loss_scale:g}"
            if norm.scaled is None
            else f"gradient norm is {norm.value}"
        )
        documents = self._documents(step, samples, source)
        if self._in_a_row == MAX_NONFINITE_STEPS:
            raise JobError(self._message(step, cause, documents))
        return f"step {step}: {cause}, step skipped" + (f"; {documents}" if documents else "")

    def _documents(self, step: int, samples: Sequence[int], source: RowSource) -> str:
        if self.passages is None:
            return ""
        try:
            rows = self.passages(samples, source.state(samples[0]))
        except (LlamaLibError, OSError) as error:
            return f"its documents cannot be named ({error})"
        found = dict.fromkeys(part.document for row in rows for part in row)
        if not found:  # random rows
            return ""
        names = [document.name(self.options) for document in list(found)[:NAMED_DOCUMENTS]]
        more = len(found) - len(names)
        return (
            f"its rows are of {', '.join(names)}"
            + (f" and {more} more" if more else "")
            + self._command(step)
        )

    def _command(self, step: int) -> str:
        if self.options.script == "benchmark":  # keeps no ledger
            return ""
        folder = self.options.checkpoint.save_dir
        return f" (all: python -m llama_lib inspect {folder} --step {step})"

    def _message(self, step: int, cause: str, documents: str) -> str:
        training, checkpoint = self.options.training, self.options.checkpoint
        saved = step_directories(checkpoint.save_dir)
        good = f"the last checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"
        advice = [f"a lower --lr (now {training.lr:g})", "a longer --warmup_steps"]
        if training.mixed_precision == "fp16":
            advice.insert(0, "-x bf16")
        if training.gradient_clipping == 0:
            advice.append("--gradient_clipping 1.0")
        return (
            f"{MAX_NONFINITE_STEPS} steps in a row were not finite, the last one step {step} "
            f"({cause}){'; ' if documents else ''}{documents}. No such step changed the weights; "
            f"{good}. Try {', '.join(advice)}; then --load auto."
        )
