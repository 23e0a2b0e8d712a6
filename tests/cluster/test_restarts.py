"""Where a restarted run begins."""

from pathlib import Path

import pytest

from llama_lib.cluster.restarts import Resume


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    return tmp_path / "saved"


def saved(save_dir: Path, step: int) -> None:
    save_dir.mkdir(exist_ok=True)
    (save_dir / "latest").write_text(f"step-{step:08d}")


@pytest.mark.parametrize("given", [[], ["-f", "auto"], ["--load=auto"]])
def test_at_the_newest_checkpoint(save_dir, given):
    argv = ["a folder/finetune.py", "-o", str(save_dir), *given]
    resume = Resume(argv)
    assert resume.argv() == [*argv, "--load", "auto"]
    assert not resume.note()


def test_at_the_given_one_until_the_run_has_its_own(save_dir):
    """A newest checkpoint that was there before is another run's."""
    saved(save_dir, 100)
    argv = ["pretrain.py", "-o", str(save_dir), "--load", "other/step-00000007"]
    resume = Resume(argv)
    assert resume.argv() == argv
    assert f"no checkpoint of this run in {save_dir}" in resume.note()
    assert "from --load other/step-00000007 again" in resume.note()
    saved(save_dir, 200)
    assert resume.argv() == [*argv, "--load", "auto"]
    assert not resume.note()


def test_other_scripts_know_themselves(save_dir):
    argv = ["benchmark.py", "-o", str(save_dir)]
    assert Resume(argv).argv() == argv
    assert "benchmark.py is not known to take --load" in Resume(argv).note()


def test_options_are_read_without_a_word(capsys):
    """What is wrong with them, or asked for, the ranks say."""
    for words in (["--lr", "-1"], ["--help"], ["--grad_clip", "1"]):
        Resume(["pretrain.py", *words])
    assert capsys.readouterr() == ("", "")
