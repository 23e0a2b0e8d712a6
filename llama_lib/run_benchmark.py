"""What benchmark.py settles by itself before the checks that all runs go through.

Invariant: no run is ever in the way of a benchmark, and a benchmark writes into none.
"""

from itertools import count
from pathlib import Path

from llama_lib.checkpoint.manifest import step_directories
from llama_lib.config import Options, script_of
from llama_lib.errors import UserError
from llama_lib.result_file import output_problems

# Real data begin anew as often as the steps need.
MANY_EPOCHS = 1_000_000


def settle(options: Options) -> list[str]:
    """Fix the length of the run and the folder of its log; returns what is worth a line.

    Raises:
        UserError: the result could not be written where it is wanted.
    """
    report, checkpoint = options.report, options.checkpoint
    if report.output is not None and (problems := output_problems(report.output)):
        raise UserError(problems)
    options.training.max_steps, options.training.num_epochs = report.num_steps, MANY_EPOCHS
    asked, checkpoint.save_dir = checkpoint.save_dir, _free_folder(checkpoint.save_dir)
    if asked == checkpoint.save_dir:
        return []
    return [f"--save_dir is {checkpoint.save_dir}: {asked} is that of another run"]


def _free_folder(folder: str) -> str:
    """`folder`, or the first of folder-2, folder-3 ... that is no run's."""
    names = (folder if number == 1 else f"{folder}-{number}" for number in count(1))
    return next(name for name in names if _is_free(Path(name)))


def _is_free(folder: Path) -> bool:
    """Whether there are no checkpoints, nor the options of a run that has yet to save one."""
    specs = folder / "specs.yaml"
    return not step_directories(folder) and (not specs.exists() or _is_benchmark(specs))


def _is_benchmark(specs: Path) -> bool:
    """Whether a run's saved options are of benchmark.py; if they cannot be read, they are not."""
    import yaml

    try:
        values = yaml.safe_load(specs.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    if not isinstance(values, dict) or not all(isinstance(each, dict) for each in values.values()):
        return False
    return script_of(values) == "benchmark"
