"""A fine-tuning run that is told to end saves first: it may have seconds left."""

import re
import signal
from pathlib import Path

import pytest

from llama_lib.checkpoint.manifest import step_directories
from llama_lib.checkpoint.verify import checkpoint_problems
from tests.distributed import test_finetune_runs
from tests.distributed.launching import start
from tests.distributed.test_resume import Folder

pytestmark = [pytest.mark.distributed, pytest.mark.full]

chat_flags = test_finetune_runs.chat_flags  # the fixture


def test_sigterm_saves_and_measures_nothing_before(chat_flags: list[str], tmp_path: Path) -> None:
    """To torchrun, as a cluster's scheduler does it; other checkpoints are measured first."""
    folder = Folder(tmp_path)
    # Half of the conversations are held out: measuring takes longer than the steps.
    slow = "-p zero2 -b 8 --accumulation_steps 8 --eval_ratio 0.5 --sample_prompts red -i 1000000"
    arguments = folder.arguments(*chat_flags, *slow.split(), "-e", "1000")
    with start("finetune.py", arguments, folder.log("run"), processes=2) as started:
        started.wait_until(lambda: len(folder.records) >= 3)
        started.send(signal.SIGTERM)
        outcome = started.wait()
    assert outcome.code != 0
    (checkpoint,) = step_directories(folder.save_dir)
    assert checkpoint.name == f"step-{len(folder.records):08}", "the present step is not saved"
    assert checkpoint_problems(checkpoint) == []
    assert f"stopped after step {len(folder.records)} as asked" in outcome.output
    assert not re.search("held-out loss at step|asked at step", outcome.output)
    assert not (folder.root / "tb" / "eval.jsonl").read_text()
