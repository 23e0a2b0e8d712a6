"""What a run says when it ends: what it was trained on and what can be done with it now.

Invariant: every command that is shown works as it is written, whatever is in a path.
"""

import shlex

from llama_lib.checkpoint.manifest import step_directory
from llama_lib.checkpoint.store import TrainerState
from llama_lib.config import Options
from llama_lib.data.loader import RowSource
from llama_lib.ledger import consumption


def trained_on(state: TrainerState, source: RowSource, available: dict[str, int]) -> list[str]:
    """Tokens of each source, as the last checkpoint has them, and what was left out.

    Args:
        available: tokens of each source in one pass, where known.
    """
    lines = ["trained on:", *consumption(state.consumed, available), *source.report()]
    if state.skipped_steps:
        lines.append(f"  left out by --skip_steps: {', '.join(state.skipped_steps)}")
    return lines


def what_next(
    options: Options, state: TrainerState, saved_step: int | None, is_chat: bool
) -> list[str]:
    """Commands that go on from here.

    Args:
        saved_step: of the newest checkpoint.
    """
    save_dir = options.checkpoint.save_dir
    lines = [
        "next:",
        "  resume      the same command with --load auto",
        f"  curves      tensorboard --logdir {_word(options.report.tensorboard_dir)}",
    ]
    best = None
    if state.best is not None:
        best = step_directory(save_dir, state.best["step"])
        lines.append(f"  best        {_word(best)} (held-out loss {state.best['loss']:.4f})")
    how, served = "--prompt 'Once'", step_directory(save_dir, saved_step or state.step)
    if is_chat:
        how, served = "--chat", best or served
    return [*lines, f"  try it      python -m llama_lib generate {_word(served)} {how}"]


def _word(path: object) -> str:
    """As a shell takes it for one word."""
    return shlex.quote(str(path))
