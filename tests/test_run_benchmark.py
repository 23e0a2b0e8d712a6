"""benchmark.py is never in the way of a run, nor a run in its way."""

import pytest

from llama_lib.checkpoint.manifest import step_directory
from llama_lib.config import SCRIPTS, dump_yaml, parse_options, script_of
from llama_lib.errors import UserError
from llama_lib.run_benchmark import settle


def test_the_length_is_that_of_num_steps():
    options = parse_options("benchmark", ["--num_steps", "40"])
    assert settle(options) == []
    assert options.training.max_steps == 40
    assert options.training.warmup_steps == 0 and options.checkpoint.save_interval is None


def test_its_folders_are_its_own():
    benchmark, others = parse_options("benchmark", []), ("pretrain", "finetune")
    folders = {benchmark.checkpoint.save_dir, benchmark.report.tensorboard_dir}
    for script in others:
        options = parse_options(script, [])
        assert not folders & {options.checkpoint.save_dir, options.report.tensorboard_dir}


def test_a_folder_with_checkpoints_is_left_alone(tmp_path):
    asked = str(tmp_path / "run")
    for occupied, free in ((None, asked), (asked, f"{asked}-2"), (f"{asked}-2", f"{asked}-3")):
        if occupied is not None:
            step_directory(occupied, 5).mkdir(parents=True)
        options = parse_options("benchmark", ["-o", asked])
        lines = settle(options)
        assert options.checkpoint.save_dir == free
        assert (f"--save_dir is {free}" in "".join(lines)) == (free != asked)


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_a_run_that_has_saved_nothing_yet_keeps_its_folder(tmp_path, script):
    """Its specs.yaml was overwritten, and its log continued, until its first checkpoint."""
    asked = tmp_path / "run"
    asked.mkdir()
    dump_yaml(parse_options(script, []), asked / "specs.yaml")
    options = parse_options("benchmark", ["-o", str(asked)])
    lines = settle(options)
    assert options.checkpoint.save_dir == f"{asked}-2" and str(asked) in lines[0]


@pytest.mark.parametrize("text", ["{", "a list", "- 1", "model: 7b", "\x00"])
def test_a_folder_whose_options_cannot_be_read_is_left_alone(tmp_path, text):
    asked = tmp_path / "run"
    asked.mkdir()
    (asked / "specs.yaml").write_text(text)
    options = parse_options("benchmark", ["-o", str(asked)])
    settle(options)
    assert options.checkpoint.save_dir == f"{asked}-2"


def test_a_benchmark_follows_another_in_its_folder(tmp_path):
    options = parse_options("benchmark", ["-o", str(tmp_path)])
    dump_yaml(options, tmp_path / "specs.yaml")
    assert settle(options) == []


def test_a_result_that_could_not_be_written_ends_it_at_once(tmp_path):
    with pytest.raises(UserError, match="--output"):
        settle(parse_options("benchmark", ["--output", str(tmp_path)]))


@pytest.mark.parametrize(
    "flag",
    ["--load auto", "--max_steps 3", "--max_tokens 1m", "-e 2", "--sample_interval 3"],
)
def test_what_makes_no_sense_is_no_option(flag):
    with pytest.raises(UserError, match="unknown flag"):
        parse_options("benchmark", flag.split())


def test_the_options_of_a_run_are_read_back(tmp_path):
    options = parse_options("benchmark", ["-c", "tiny", "-p", "zero2", "--num_steps", "12"])
    settle(options)
    dump_yaml(options, tmp_path / "specs.yaml")
    again = parse_options("benchmark", ["--spec_file", str(tmp_path / "specs.yaml")])
    assert again.to_dict() == options.to_dict()


def test_saved_options_say_which_script_they_are_of():
    for script in SCRIPTS:
        assert script_of(parse_options(script, []).to_dict()) == script
