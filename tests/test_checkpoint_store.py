"""Saving and loading a real engine in this process: whole or not at all, and the same again."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from llama_lib import host
from llama_lib.errors import RunError, UserError

host.install()

from llama_lib.checkpoint import manifest, store, tensors, verify, writing  # noqa: E402
from llama_lib.checkpoint.manifest import MANIFEST, step_directories  # noqa: E402
from llama_lib.data.tokenizer import save_tokenizer, train_tokenizer  # noqa: E402
from llama_lib.engine import Engine  # noqa: E402
from tests.distributed.cases import MODEL  # noqa: E402
from tests.distributed.checks import (  # noqa: E402
    build,
    optimizer_hashes,
    train_step,
    weight_hashes,
)

if torch.cuda.is_available():
    pytest.skip("tests/gpu has these on a GPU", allow_module_level=True)


pytestmark = pytest.mark.usefixtures("one_process")


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it and clean up."""


@pytest.fixture(scope="module")
def engine(one_process) -> Engine:
    built = build("zero2", "bf16")
    train_step(built, 1)
    return built


@pytest.fixture
def save(engine: Engine, tmp_path: Path) -> Callable[..., Path]:
    def save_step(step: int, keep_last: int | None = None) -> Path:
        state = store.TrainerState(step, 0, 0, 0, 42, {}, scaler=store.scaler_state(engine))
        return store.save(engine, state, None, str(tmp_path), keep_last)

    return save_step


def newest_loadable(save_dir: Path) -> Path | None:
    return store.find_checkpoint("auto", str(save_dir))[0]


def test_a_checkpoint_holds_everything_and_verifies(save):
    path = save(1)
    assert verify.checkpoint_problems(path) == []
    on_disk = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert set(manifest.Manifest.read(path).files) == on_disk - {MANIFEST}
    assert {"model/config.json", "model/generation_config.json"} <= on_disk
    # Generation once ran without the cache of keys and values: training's setting was saved.
    assert GenerationConfig.from_pretrained(path / "model").use_cache
    assert {"lr_scheduler.json", "trainer_state.json"} <= on_disk
    assert not [name for name in on_disk if name.endswith((".bin", ".pt", ".pkl"))]


def test_a_bit_flipped_in_any_file_is_found(save):
    path = save(1)
    for name in manifest.Manifest.read(path).files:
        original = (path / name).read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 3] ^= 1
        (path / name).write_bytes(damaged)
        assert verify.checkpoint_problems(path) == [f"{name}: contents changed (SHA-256 differs)"]
        (path / name).write_bytes(original)
    assert verify.checkpoint_problems(path) == []


def test_verify_answers_with_exit_codes(save, tmp_path, capsys):
    path = save(1)
    assert verify.main([str(path)]) == 0
    assert "good; step 1" in capsys.readouterr().out
    os.truncate(path / "trainer_state.json", 3)
    assert verify.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "DAMAGED" in out and "trainer_state.json: 3 bytes" in out
    with pytest.raises(UserError, match="Hugging Face folder"):
        verify.main([str(path / "model")])


def fail_nth(number: int, real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    calls = iter(range(1, 1000))

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise error
        return real(*args, **kwargs)

    return called


# Where a save can be interrupted: module, function, which call of it.
MOMENTS = {
    "first shard": (tensors, "save_file", 1),
    "second shard": (tensors, "save_file", 2),
    "random state": (writing, "save_file", 1),
    "index": (writing, "write_index", 1),
    "trainer state": (writing, "write_json", 2),
    "manifest": (manifest, "write_json", 1),
    "before the rename": (manifest, "sync_directory", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_saving_leaves_the_older_checkpoint(save, tmp_path, monkeypatch, moment):
    older = save(1)
    module, name, number = MOMENTS[moment]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail_nth(number, getattr(module, name), Killed()))
        with pytest.raises(Killed):
            save(2)
    assert (tmp_path / "step-00000002.tmp").exists(), "nothing was interrupted"
    assert newest_loadable(tmp_path) == older
    assert verify.checkpoint_problems(older) == []
    newer = save(2)
    assert newest_loadable(tmp_path) == newer
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_disk_error_while_saving_leaves_the_older_checkpoint(save, tmp_path, monkeypatch, moment):
    older = save(1)
    module, name, number = MOMENTS[moment]
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail_nth(number, getattr(module, name), full))
        with pytest.raises(RunError, match=r"No space left.*Older checkpoints are untouched"):
            save(2, keep_last=1)
    assert step_directories(tmp_path) == [older]
    assert not list(tmp_path.glob("*.tmp"))
    assert newest_loadable(tmp_path) == older


def test_too_little_space_is_found_before_anything_is_written(save, tmp_path, monkeypatch):
    older = save(1)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(manifest.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RunError, match="a checkpoint needs about"):
        save(2)
    assert step_directories(tmp_path) == [older]


def test_keep_last_removes_only_after_a_newer_one_is_complete(save, tmp_path):
    for step in (1, 2, 3):
        save(step, keep_last=2)
    assert [path.name for path in step_directories(tmp_path)] == ["step-00000003", "step-00000002"]


def test_the_best_checkpoint_is_kept_beside_the_last_and_named(engine, tmp_path):
    def save(step: int, best: int | None) -> None:
        state = store.TrainerState(step, 0, 0, 0, 42, {})
        state.best = None if best is None else {"step": best, "loss": 1.0}
        store.save(engine, state, None, str(tmp_path), keep_last=1)

    def kept() -> list[int]:
        return [int(path.name[5:]) for path in step_directories(tmp_path)]

    best = tmp_path / "best"
    save(1, None)
    assert not best.exists()
    for step in (2, 3, 4):
        save(step, best=2)
        assert best.read_text() == "step-00000002\n"
        assert (tmp_path / "latest").read_text() == f"step-{step:08d}\n"
    assert kept() == [4, 2]
    assert store.read_state(store.step_directory(tmp_path, 4)).best == {"step": 2, "loss": 1.0}
    save(5, best=5)
    assert kept() == [5]
    assert best.read_text() == "step-00000005\n"


@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_a_pointer_that_fails_is_a_warning_not_a_failed_save(
    engine, tmp_path, monkeypatch, caplog, pointer
):
    """The finished checkpoint was reported as failed, and its step could not be saved again."""
    real = manifest._point

    def fail(target: Path, name: str) -> None:
        if name == pointer:
            raise OSError(28, "No space left on device")
        real(target, name)

    monkeypatch.setattr(manifest, "_point", fail)
    monkeypatch.setattr(writing.logger, "propagate", True)
    state = store.TrainerState(1, 0, 0, 0, 42, {}, best={"step": 1, "loss": 1.0})
    with caplog.at_level(logging.WARNING, "llama_lib"):
        path = store.save(engine, state, None, str(tmp_path), None)
    assert verify.checkpoint_problems(path) == []
    assert newest_loadable(tmp_path) == path
    other = {"latest": "best", "best": "latest"}[pointer]
    assert (tmp_path / other).read_text() == f"{path.name}\n"
    assert f"the file `{pointer}` could not be written: [Errno 28] No space left" in caplog.text


def test_a_step_that_is_saved_already_is_no_warning(save):
    path = save(1)
    with pytest.raises(RunError, match="is there already"):
        save(1)
    assert verify.checkpoint_problems(path) == []


def test_the_saved_model_stops_and_speaks_as_it_was_trained(engine, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    save_tokenizer(train_tokenizer(["some words"] * 9, 300), tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ eos_token }}"
    state = store.TrainerState(1, 0, 0, 0, 42, {})
    path = store.save(engine, state, tokenizer, str(tmp_path), None, end_token_ids=[7, 9])
    assert GenerationConfig.from_pretrained(path / "model").eos_token_id == [7, 9]
    served = AutoTokenizer.from_pretrained(path / "model")
    talk = [{"role": "user", "content": "some words"}]
    assert served.apply_chat_template(talk) == tokenizer.apply_chat_template(talk)
    state.step = 2
    path = store.save(engine, state, tokenizer, str(tmp_path), None)
    assert GenerationConfig.from_pretrained(path / "model").eos_token_id == tokenizer.eos_token_id


def test_auto_passes_over_damage_and_says_so(save, tmp_path):
    first, second, third = save(1), save(2), save(3)
    os.truncate(next((third / "model").glob("*.safetensors")), 10)
    (second / MANIFEST).unlink()
    found, lines = store.find_checkpoint("auto", str(tmp_path))
    assert found == first
    assert [line.split()[0] for line in lines] == [third.name, second.name]


@pytest.mark.parametrize("load", ["auto", "named"])
def test_what_is_left_of_a_killed_save_is_named(save, tmp_path, load):
    first = save(1)
    for name in ("step-00000003.tmp", "step-00000002.tmp", "latest.tmp"):
        (tmp_path / name).mkdir()
    found, lines = store.find_checkpoint("auto" if load == "auto" else str(first), str(tmp_path))
    assert found == first
    assert lines == [
        f"step-00000002.tmp, step-00000003.tmp in {tmp_path}: what is left of a save that did not "
        "finish; it is never loaded, and the next save removes it"
    ]
    shutil.rmtree(first)
    found, lines = store.find_checkpoint("auto", str(tmp_path))
    assert found is None and "step-00000002.tmp" in lines[0] and "starting afresh" in lines[1]


def test_auto_with_only_damage_ends_and_with_nothing_starts_afresh(save, tmp_path):
    assert store.find_checkpoint("auto", str(tmp_path)) == (
        None,
        [f"--load auto: no checkpoint in {tmp_path}, starting afresh"],
    )
    (save(1) / MANIFEST).unlink()
    with pytest.raises(RunError, match="no good checkpoint"):
        store.find_checkpoint("auto", str(tmp_path))


def test_loading_brings_every_bit_back(engine, save):
    before = weight_hashes(engine), optimizer_hashes(engine)
    path = save(1)
    expected = [train_step(engine, step) for step in (2, 3)]
    assert weight_hashes(engine) != before[0]
    store.load(engine, path, store.read_state(path))
    assert (weight_hashes(engine), optimizer_hashes(engine)) == before
    assert [train_step(engine, step) for step in (2, 3)] == expected


def test_weights_of_another_shape_are_refused_by_name(engine, save, tmp_path):
    """ColossalAI loads what fits and swallows the rest."""
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(LlamaConfig(**{**MODEL, "intermediate_size": 96}))
    other.save_pretrained(tmp_path / "other")
    before = weight_hashes(engine)
    with pytest.raises(UserError, match=r"mlp.down_proj.weight: shape \[64, 96\], the model has"):
        store.load_weights(engine, tmp_path / "other", "--model_path")
    fewer = LlamaForCausalLM(LlamaConfig(**{**MODEL, "num_hidden_layers": 3}))
    fewer.save_pretrained(tmp_path / "fewer")
    with pytest.raises(UserError, match="9 of 39 tensors missing"):
        store.load_weights(engine, tmp_path / "fewer", "--model_path")
    assert weight_hashes(engine) == before


def test_a_folder_without_safetensors_is_refused(engine, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="safetensors only"):
        store.load_weights(engine, tmp_path, "--model_path")
