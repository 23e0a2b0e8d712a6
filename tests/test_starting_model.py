"""The folder that a run starts from: whole, and with everything that belongs to a model."""

import fnmatch
import json
from pathlib import Path

import pytest

from llama_lib.checkpoint.manifest import Manifest, file_record
from llama_lib.config import parse_options
from llama_lib.errors import RunError
from llama_lib.starting_model import local_model, saved_script, starting_model


def checkpoint(save_dir: Path, step: int) -> Path:
    folder = save_dir / f"step-{step:08}"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    record = file_record(folder / "model" / "config.json")
    Manifest(step, "zero2", {}, {}, {"model/config.json": record}).write(folder)
    return folder


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path):
    """`--load auto` without --model_path took its shape from it and stopped there."""
    options = parse_options("finetune", ["--load", "auto", "-o", str(tmp_path)])
    older, newer = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert starting_model(options) == newer / "model"
    (newer / "model" / "config.json").write_text("")
    assert starting_model(options) == older / "model"
    (older / "complete.json").unlink()
    with pytest.raises(RunError, match="no good checkpoint"):
        starting_model(options)


def test_a_hub_model_comes_with_its_template(monkeypatch, tmp_path):
    """A template in chat_template.jinja was left behind, and another one taken in its place."""
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    local_model("owner/name", str(tmp_path / "cache"))
    files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"]
    files += ["chat_template.jinja", "model-00001-of-00002.safetensors"]
    files += ["model.safetensors.index.json"]
    wanted = [name for name in files if any(fnmatch.fnmatch(name, each) for each in asked)]
    assert wanted == files
    assert not any(fnmatch.fnmatch("pytorch_model.bin", each) for each in asked)


def test_a_checkpoint_says_which_script_it_is_of(tmp_path):
    for script in ("pretrain", "finetune"):
        options = parse_options(script, ["--model_path", "x"]).to_dict()
        (tmp_path / "trainer_state.json").write_text(json.dumps({"options": options}))
        assert saved_script(tmp_path) == script
    (tmp_path / "trainer_state.json").write_text("{")
    assert saved_script(tmp_path) is None
