"""`python -m llama_lib COMMAND`: finds the command's function and runs it.

Invariant: a command's module is imported when the command runs, never for a list or a help page.
"""

import difflib
import importlib

from llama_lib.cli import run
from llama_lib.errors import UserError

# name: (module:function taking the arguments, what it does)
COMMANDS = {
    "tokenizer": ("llama_lib.data.tokenizer_command:main", "train a tokenizer on text"),
    "prepare": ("llama_lib.data.prepare:main", "tokenise text into a prepared dataset"),
    "inspect": ("llama_lib.data.inspect:main", "show prepared data, a step or conversations"),
    "verify": ("llama_lib.checkpoint.verify:main", "check a checkpoint's files, names and shapes"),
    "generate": ("llama_lib.inference:generate_main", "continue a prompt, or talk to a chat model"),
    "evaluate": ("llama_lib.inference:evaluate_main", "loss of a checkpoint on held-out text"),
    "plan": ("llama_lib.planner.command:main", "memory and time of a run, before it, without GPUs"),
    "doctor": ("llama_lib.cluster.doctor:main", "check hosts before a run, and this installation"),
    "launch": ("llama_lib.cluster.launch:main", "run a script on this host or on many"),
    "compare": ("llama_lib.compare:main", "set results of benchmark.py side by side"),
}


def help_text() -> str:
    lines = ["usage: python -m llama_lib COMMAND [options]", ""]
    lines += [f"  {name:<12}{meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join([*lines, "", "python -m llama_lib COMMAND --help shows a command's options."])


def main(argv: list[str]) -> int | None:
    if argv[:1] in (["-h"], ["--help"]):
        print(help_text())
        return 0
    if not argv:
        raise UserError(f"no command given\n{help_text()}")
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"unknown command: got {name!r}, expected one of {', '.join(COMMANDS)}{hint}"
        )
    module, function = COMMANDS[name][0].split(":")
    return getattr(importlib.import_module(module), function)(rest)


if __name__ == "__main__":
    run(main)
