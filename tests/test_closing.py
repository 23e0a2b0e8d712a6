"""What a run says when it ends can be pasted into a shell."""

import shlex

from llama_lib.checkpoint.store import TrainerState
from llama_lib.closing import what_next
from llama_lib.config import parse_options


def test_paths_that_a_shell_would_cut_are_quoted(tmp_path):
    """`-o "my runs/it's"` gave a command with an open quote."""
    folder = str(tmp_path / "my runs" / "it's $HOME")
    options = parse_options("pretrain", ["-o", folder, "-t", f"{folder}/tb"])
    state = TrainerState(8, 0, 64, 0, 42, {}, best={"step": 4, "loss": 1.5, "rows": 8})
    _, _, curves, best, serve = map(shlex.split, what_next(options, state, 8, is_chat=False))
    assert curves[1:] == ["tensorboard", "--logdir", f"{folder}/tb"]
    assert best[1] == f"{folder}/step-00000004"
    assert serve[-3:] == [f"{folder}/step-00000008", "--prompt", "Once"]
