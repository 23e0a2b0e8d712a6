"""What train.sbatch has to know of a run: where it is saved, how it starts, what it has reached.

Invariant: answers come from the options as the run itself reads them, and from its checkpoints;
nothing here needs torch or a GPU.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

# The batch script is a copy in a folder of Slurm's, but this file lies in the project.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama_lib.checkpoint.manifest import step_directories
from llama_lib.cli import run
from llama_lib.config import SCRIPTS, parse_options
from llama_lib.errors import UserError

STATE = "trainer_state.json"


def describe(script: str, *arguments: str) -> None:
    """Prints the absolute save_dir, then the checkpoint to start from: `auto` adds --load auto,
    `given` leaves the one that the command names, `none` is for what cannot be continued."""
    name = Path(script).name.removesuffix(".py")
    if name not in SCRIPTS:
        known = ", ".join(f"{script}.py" for script in SCRIPTS)
        raise UserError(f"train.sbatch: got {script!r}, expected one of {known} and its options")
    checkpoint = parse_options(name, arguments).checkpoint
    print(Path(checkpoint.save_dir).absolute())
    if name == "benchmark":
        print("none")
    elif checkpoint.load in (None, "auto") or step_directories(checkpoint.save_dir):
        print("auto")
    else:
        print("given")


def reached(save_dir: str) -> None:
    """Prints the step of the newest checkpoint and the last step of its run; nothing if none."""
    latest = Path(save_dir) / "latest"
    if latest.is_file():
        state = json.loads((latest.parent / latest.read_text().strip() / STATE).read_text())
        print(state["step"], state["schedule"]["num_steps"])


def main(argv: list[str]) -> None:
    ask: dict[str, Callable[..., None]] = {"describe": describe, "reached": reached}
    ask[argv[0]](*argv[1:])


if __name__ == "__main__":
    run(main)
