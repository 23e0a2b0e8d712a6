"""Steps whose gradients are not finite: skipped, counted, and at some point the end of a run.

Invariant: no such step has changed the weights.
"""

from llama_lib.checkpoint.manifest import step_directories
from llama_lib.config import Options
from llama_lib.engine import GradientNorm
from llama_lib.errors import RunError

# One bad batch or a loss scale still settling is normal; ten in a row never recovered by itself in
# the reports of users whose runs went on with NaN weights for hours.
MAX_NONFINITE_STEPS = 10


class NonfiniteSteps:
    """Counts those in a row."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._in_a_row = 0

    def check(self, step: int, norm: GradientNorm) -> str | None:
        """What to say about the gradient norm of a step, which ColossalAI has on the host already.

        Raises:
            RunError: it is the tenth step in a row that is not finite.
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
        if self._in_a_row == MAX_NONFINITE_STEPS:
            raise RunError(self._message(step, cause))
        return f"step {step}: {cause}, step skipped"

    def _message(self, step: int, cause: str) -> str:
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
            f"({cause}). No such step changed the weights; {good}. "
            f"Try {', '.join(advice)}; then --load auto."
        )
