"""The two kinds of trouble a command reports in one message and without a traceback.

Invariant: the exit code of every command follows from the class of the error alone.
"""

from collections.abc import Sequence


class LlamaLibError(Exception):
    """Base of the errors that end a command with a message; `exit_code` is the process's status."""

    exit_code = 1


class RunError(LlamaLibError):
    """The run failed or a check found a problem (exit code 1)."""


class JobError(RunError):
    """A failure that every process of a run meets alike: one message is enough."""


class UserError(LlamaLibError):
    """The user asked for something that cannot be done as asked (exit code 2).

    Takes one message or several: several are shown together, so that one edit mends them all.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
