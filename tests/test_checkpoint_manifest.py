"""What counts as a checkpoint, what is refused, and what is kept: files only, no model."""

import json
import shutil
from pathlib import Path

import pytest

from llama_lib.checkpoint import manifest
from llama_lib.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    check_load_argument,
    file_record,
    free_space_problem,
    hash_problems,
    publish,
    refuse_occupied,
    remove_old,
    set_aside_newer,
    size_problems,
    step_directories,
    step_directory,
)
from llama_lib.errors import RunError, UserError

CONTENTS = {"model/weights": b"w" * 1000, "optimizer/moments": b"m" * 2000, "state.json": b"{}"}


def checkpoint(save_dir: Path, step: int, complete: bool = True) -> Path:
    """A small directory that looks like a checkpoint of `step`."""
    directory = step_directory(save_dir, step)
    for name, content in CONTENTS.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if complete:
        files = {name: file_record(directory / name) for name in CONTENTS}
        Manifest(step, "zero2", {"dp": 1}, {"torch": "2"}, files).write(directory)
    return directory


def problems(directory: Path) -> list[str]:
    found = Manifest.read(directory)
    return size_problems(directory, found) or hash_problems(directory, found, found.files)


def test_what_was_written_is_read(tmp_path):
    directory = checkpoint(tmp_path, 7)
    found = Manifest.read(directory)
    assert (found.step, found.plugin, found.layout) == (7, "zero2", {"dp": 1})
    assert found.files["model/weights"].size == 1000
    assert problems(directory) == []


@pytest.mark.parametrize("name", CONTENTS)
def test_a_truncated_file_is_named(tmp_path, name):
    directory = checkpoint(tmp_path, 1)
    (directory / name).write_bytes(CONTENTS[name][:-1])
    size = len(CONTENTS[name])
    assert problems(directory) == [f"{name}: {size - 1} bytes, expected {size}"]


@pytest.mark.parametrize("name", CONTENTS)
def test_a_flipped_bit_is_named(tmp_path, name):
    directory = checkpoint(tmp_path, 1)
    content = bytearray(CONTENTS[name])
    content[len(content) // 2] ^= 0x10
    (directory / name).write_bytes(content)
    assert problems(directory) == [f"{name}: contents changed (SHA-256 differs)"]


def test_a_missing_file_is_named(tmp_path):
    directory = checkpoint(tmp_path, 1)
    (directory / "model/weights").unlink()
    assert problems(directory) == ["model/weights: missing"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "the save did not finish"),
        (lambda path: path.write_text(path.read_text()[:-40]), "not a valid manifest"),
        (lambda path: path.write_text("[]"), "not a valid manifest"),
        (lambda path: path.write_text('{"version": 1}'), "not a valid manifest"),
        (lambda path: path.write_text('{"version": 99, "files": {}}'), "format 99"),
        (lambda path: path.write_bytes(b"\xff\x00"), "not a valid manifest"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(tmp_path, damage, message):
    directory = checkpoint(tmp_path, 1)
    damage(directory / MANIFEST)
    with pytest.raises(RunError, match=message):
        Manifest.read(directory)


def test_checkpoints_come_newest_first_and_unfinished_ones_not_at_all(tmp_path):
    for step in (5, 100, 20):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 200).rename(tmp_path / "step-00000200.tmp")
    (tmp_path / "logs").mkdir()
    (tmp_path / "step-00000300").write_text("a file")
    names = [directory.name for directory in step_directories(tmp_path)]
    assert names == ["step-00000100", "step-00000020", "step-00000005"]
    assert step_directories(tmp_path / "missing") == []


def test_publishing_renames_and_points_at_the_newest(tmp_path):
    temporary = checkpoint(tmp_path, 3).rename(tmp_path / "step-00000003.tmp")
    final = step_directory(tmp_path, 3)
    publish(temporary, final)
    assert problems(final) == []
    assert not temporary.exists()
    assert (tmp_path / "latest").read_text() == "step-00000003\n"


def test_publishing_never_replaces_a_checkpoint(tmp_path):
    older = checkpoint(tmp_path, 3)
    temporary = checkpoint(tmp_path / "new", 3).rename(tmp_path / "step-00000003.tmp")
    with pytest.raises(FileExistsError, match="step-00000003 is there already"):
        publish(temporary, older)
    assert problems(older) == []


def test_old_checkpoints_go_and_broken_ones_do_not_count(tmp_path):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    broken = checkpoint(tmp_path, 4, complete=False)
    remove_old(tmp_path, None)
    assert len(step_directories(tmp_path)) == 4
    remove_old(tmp_path, 2)
    assert step_directories(tmp_path) == [broken, *(step_directory(tmp_path, s) for s in (3, 2))]
    assert problems(step_directory(tmp_path, 3)) == problems(step_directory(tmp_path, 2)) == []


def test_a_checkpoint_half_deleted_is_not_complete(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint(tmp_path, step)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_old(tmp_path, 1)
    with pytest.raises(RunError, match="did not finish"):
        Manifest.read(step_directory(tmp_path, 1))
    assert problems(step_directory(tmp_path, 2)) == []


def test_checkpoints_after_the_resumed_step_are_kept_under_another_name(tmp_path):
    for step in (5, 10, 15):
        checkpoint(tmp_path, step)
    lines = set_aside_newer(tmp_path, 5)
    assert [directory.name for directory in step_directories(tmp_path)] == ["step-00000005"]
    assert len(lines) == 2
    assert problems(tmp_path / "step-00000010.aside-1") == []


def test_little_space_is_said_with_numbers(tmp_path):
    assert free_space_problem(tmp_path, 1) is None
    needed = shutil.disk_usage(tmp_path).total + 2**30
    message = free_space_problem(tmp_path, needed)
    assert message is not None
    assert f"a checkpoint needs about {needed / 2**30:.2f} GiB" in message


# -- what --load and --save_dir refuse before anything starts --------------------------------------


def test_auto_and_a_checkpoint_are_taken(tmp_path):
    check_load_argument("auto", str(tmp_path))
    check_load_argument(str(checkpoint(tmp_path, 1)), str(tmp_path))


def test_a_missing_path_is_refused_with_what_there_is(tmp_path):
    checkpoint(tmp_path, 7)
    with pytest.raises(UserError, match=r"no such directory.*step-00000007") as error:
        check_load_argument(str(tmp_path / "step-7"), str(tmp_path))
    assert error.value.exit_code == 2


def test_a_hugging_face_folder_is_refused_with_the_flag_for_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=f"--model_path {tmp_path}"):
        check_load_argument(str(tmp_path), "checkpoint")


def test_a_folder_of_checkpoints_is_refused_with_the_newest(tmp_path):
    checkpoint(tmp_path, 7)
    with pytest.raises(UserError, match="step-00000007 is the newest"):
        check_load_argument(str(tmp_path), "checkpoint")


@pytest.mark.parametrize("load", [None, "elsewhere/step-00000007"])
def test_a_save_dir_in_use_is_refused_unless_it_is_continued(tmp_path, load):
    refuse_occupied(str(tmp_path), load)
    directory = checkpoint(tmp_path, 7)
    with pytest.raises(UserError, match=r"already holds 1 checkpoint.*--load auto"):
        refuse_occupied(str(tmp_path), load)
    refuse_occupied(str(tmp_path), "auto")
    refuse_occupied(str(tmp_path), str(directory))
