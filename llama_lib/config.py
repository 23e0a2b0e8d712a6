"""The options of a run: from a command line and a file, and back.

Invariant: default < file < flag, and whatever is wrong is one message. The options themselves are
in option_tree.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama_lib import option_pages, private, spec_file
from llama_lib.errors import UserError
from llama_lib.option_tree import (
    SECTIONS,
    CheckpointOptions,
    DataOptions,
    ModelOptions,
    ParallelOptions,
    ReportOptions,
    TrainingOptions,
    WatchOptions,
)
from llama_lib.options import Typed, declared, read

SCRIPTS = {
    "pretrain": "Pre-train a Llama on text, from scratch or from given weights.",
    "finetune": "Fine-tune a Llama on instructions and chats.",
    "benchmark": "Measure throughput, TFLOPS and memory of a training run.",
}
# Spellings of the upstream scripts, the last one as misspelt there.
DEPRECATED = {
    "grad_checkpoint": "gradient_checkpoint",
    "grad_clip": "gradient_clipping",
    "weigth_decay": "weight_decay",
}


@dataclass
class Options:
    """The options of one run. `typed` names those given on the command line or in the file, `flags`
    those on the command line alone: a run's specs.yaml names them all."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    report: ReportOptions = field(default_factory=ReportOptions)
    watch: WatchOptions = field(default_factory=WatchOptions)
    script: str = "pretrain"
    typed: frozenset[str] = field(default=frozenset(), compare=False)
    flags: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def recompute(self) -> str:
        """What the backward pass computes again: none, selective or full."""
        return "full" if self.model.gradient_checkpoint else self.model.recompute

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section and name, as they may be shown and stored: passwords are masked.

        Options the script does not have are left out.
        """
        known = declared(SECTIONS, self.script)
        return {
            section: {
                name: private.masked_values(value)
                for name, value in asdict(getattr(self, section)).items()
                if name in known
            }
            for section in SECTIONS
        }


def parse_options(script: str, argv: Sequence[str] | None = None) -> Options:
    """The options of `script` from `argv` (default: the command line) and its --spec_file.

    A flag beats the file, the file beats the default. Raises one UserError for everything wrong.
    """
    known = declared(SECTIONS, script)
    typed = read(
        known,
        sys.argv[1:] if argv is None else argv,
        script=script,
        deprecated=DEPRECATED,
        help_page=lambda: help_text(script),
    )
    values = {name: item.initial for name, item in known.items()} | typed.file | typed.flags
    problems = typed.problems + _masked(typed) + _conflicts(typed.flags, values)
    if problems:
        raise UserError(problems)
    sections = {
        section: tree(**{n: v for n, v in values.items() if known[n].section == section})
        for section, tree in SECTIONS.items()
    }
    given = frozenset(typed.flags)
    return Options(**sections, script=script, typed=given | frozenset(typed.file), flags=given)


def _masked(typed: Typed) -> list[str]:
    """Values of the file that are what was stored in the place of a secret."""
    return [
        f"{name}: the file holds {private.MASK} where a password stood, which is never stored; "
        f"give --{name} again"
        for name, value in typed.file.items()
        if name not in typed.flags and private.MASK in str(value)
    ]


def _conflicts(flags: dict[str, Any], values: dict[str, Any]) -> list[str]:
    # Only a typed --accumulation_steps conflicts: a run's saved options hold both, the one derived.
    problems = []
    if "accumulation_steps" in flags and values["global_batch_tokens"] is not None:
        problems.append(
            "--accumulation_steps and --global_batch_tokens set the same thing: got both, expected "
            "one; leave one out, or --global_batch_tokens none to undo the file's"
        )
    recompute = values["recompute"]
    # The file of a run with -g holds `recompute: none` beside it, which is its default.
    asked = recompute != "none" or "recompute" in flags
    if values["gradient_checkpoint"] and asked and recompute != "full":
        problems.append(
            f"--gradient_checkpoint is --recompute full: got --recompute {recompute} too, expected "
            "one; leave one out, or --no-gradient_checkpoint to undo the file's"
        )
    if values.get("ignore_steps", 0) >= values.get("num_steps", math.inf):
        problems.append(
            f"--ignore_steps {values['ignore_steps']} leaves nothing of --num_steps "
            f"{values['num_steps']} to measure; expected fewer"
        )
    return problems


def dump_yaml(options: Options, path: str | Path) -> None:
    """Writes the options as a file that --spec_file reads back."""
    spec_file.dump(options.to_dict(), path)


def script_of(values: Mapping[str, Mapping[str, Any]]) -> str:
    """The script whose options these are, by section and name: a run's saved ones."""
    names = {name for section in values.values() for name in section}
    # Checkpoints of older versions lack options that were added since.
    return max(SCRIPTS, key=lambda script: -len(names - set(declared(SECTIONS, script))))


def help_text(script: str) -> str:
    """The page of --help."""
    return option_pages.help_page(declared(SECTIONS, script), script, SCRIPTS[script])


def options_table(script: str, beside: str | None = None) -> str:
    """The options of `script` as markdown; with `beside` only what that other script has not, or
    has with another default."""
    known = declared(SECTIONS, script)
    others = declared(SECTIONS, beside) if beside else {}
    return option_pages.markdown_tables(
        {
            name: item
            for name, item in known.items()
            if name not in others or item.default != others[name].default
        }
    )
