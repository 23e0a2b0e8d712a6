"""Loading a Hugging Face folder in one process: what is refused, shown and found wrong.

Other layouts, and how much memory it takes, are in tests/distributed/test_loading.py.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llama_lib import host
from llama_lib.errors import RunError, UserError

host.install()

from llama_lib.checkpoint import weights  # noqa: E402
from llama_lib.checkpoint.resize import NewRows  # noqa: E402
from llama_lib.checkpoint.tensors import TensorReader, open_weights  # noqa: E402
from llama_lib.checkpoint.weights import load_weights  # noqa: E402
from llama_lib.data import progress  # noqa: E402
from llama_lib.engine import Engine  # noqa: E402
from llama_lib.initial_model import build_model  # noqa: E402
from tests.distributed.cases import MODEL  # noqa: E402
from tests.distributed.checks import build, weight_hashes  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("tests/gpu has these on a GPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_process")

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def engine(one_process) -> Engine:
    return build("zero2", "fp16")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Let `edit` change the tensors of a saved model."""
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**MODEL))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_every_tensor_arrives(engine, saved):
    before = weight_hashes(engine)
    load_weights(engine, saved, "--model_path")
    expected = load_file(saved / FILE)
    assert weight_hashes(engine).keys() == before.keys() == expected.keys()
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter.data, expected[name].half()), name


def test_a_tensor_that_was_passed_over_is_found(engine, saved, monkeypatch):
    change(saved, lambda tensors: tensors["model.norm.weight"].mul_(2))
    places = weights._places

    def without_the_last_norm(engine: Engine) -> Iterator[Any]:
        yield from ((name, found) for name, found in places(engine) if name != "model.norm.weight")

    monkeypatch.setattr(weights, "_places", without_the_last_norm)
    with pytest.raises(RunError, match=r"1 of 39 loaded tensors differ.*model.norm.weight"):
        load_weights(engine, saved, "--model_path")


def test_a_master_that_was_passed_over_is_found(engine, saved, monkeypatch):
    change(saved, lambda tensors: tensors["model.norm.weight"].mul_(3))
    master = engine.optimizer.get_working_to_master_map()[id(engine.module.model.norm.weight)]
    fill = weights._fill

    def fill_and_lose(*args: Any) -> None:
        fill(*args)
        master.fill_(1.0)

    monkeypatch.setattr(weights, "_fill", fill_and_lose)
    with pytest.raises(RunError, match=r"1 of 39 loaded tensors differ.*model.norm.weight"):
        load_weights(engine, saved, "--model_path")


def test_values_too_large_for_fp16_are_refused(engine, saved):
    change(saved, lambda tensors: tensors["lm_head.weight"][3].fill_(1e6))
    with pytest.raises(UserError, match=r"not finite in fp16, first lm_head.weight; use -x bf16"):
        load_weights(engine, saved, "--model_path")


def test_files_that_are_cut_short_or_missing_are_refused(saved):
    size = (saved / FILE).stat().st_size
    os.truncate(saved / FILE, size // 2)
    with pytest.raises(UserError, match=r"--model_path .* is damaged or not complete"):
        open_weights(saved, shapes(), "--model_path")
    (saved / FILE).unlink()
    with pytest.raises(UserError, match="safetensors only"):
        open_weights(saved, shapes(), "--model_path")
    index = {"weight_map": dict.fromkeys(shapes(), "model-00001-of-00002.safetensors")}
    (saved / f"{FILE}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"not complete .*model-00001-of-00002.safetensors"):
        open_weights(saved, shapes(), "--model_path")
    (saved / f"{FILE}.index.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        open_weights(saved, shapes(), "--model_path")


def test_quantised_weights_are_refused(saved):
    name = "model.layers.0.mlp.up_proj.weight"
    change(saved, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(UserError, match=rf"{name}: stored as I8, expected one of F32, BF16, F16"):
        open_weights(saved, shapes(), "--model_path")


def test_smaller_tables_only_where_rows_are_to_be_added(saved):
    larger = shapes() | {
        "model.embed_tokens.weight": (510, MODEL["hidden_size"]),
        "lm_head.weight": (510, MODEL["hidden_size"]),
    }
    with pytest.raises(UserError, match=r"lm_head.weight: shape \[500, 64\], the model has \[510"):
        open_weights(saved, larger, "--model_path")
    open_weights(saved, larger, "--model_path", grows=True)
    wider = larger | {"model.embed_tokens.weight": (510, 80)}
    with pytest.raises(UserError, match=r"shape \[500, 64\], the model has \[510, 80\]"):
        open_weights(saved, wider, "--model_path", grows=True)
    fewer = larger | {"lm_head.weight": (490, MODEL["hidden_size"])}
    with pytest.raises(UserError, match=r"shape \[500, 64\], the model has \[490, 64\]"):
        open_weights(saved, fewer, "--model_path", grows=True)


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--model_path", "give --model_path a folder whose weights belong to its config.json."),
        ("--load", "Give the model the run started with."),
    ],
)
def test_what_mends_weights_that_do_not_fit_is_something_the_command_has(saved, flag, remedy):
    """It was --config, which finetune.py lacks and --model_path overrules."""
    with pytest.raises(UserError) as raised:
        open_weights(saved, shapes() | {"model.norm.weight": (65,)}, flag)
    assert str(raised.value).startswith(f"{flag} {saved} does not fit the model: ")
    assert str(raised.value).endswith(remedy) and "--config" not in str(raised.value)


def test_spare_rows_of_the_tables_are_given_to_new_tokens(engine, saved):
    load_weights(engine, saved, "--model_path", new_rows=NewRows(range(490), [495]))
    for name, stored in load_file(saved / FILE).items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            stored[495] = stored[:490].double().mean(0)
        found = dict(engine.module.named_parameters())[name].data
        assert torch.equal(found, stored.half()), name


def test_the_mean_of_a_table_is_computed_once(engine, saved, monkeypatch):
    """It was for every copy of the table: filling, masters and two comparisons."""
    averaged, asked = [], []
    mean_row, tensor = weights.mean_row, TensorReader.tensor

    def counted_mean(stored: torch.Tensor, old: Any) -> torch.Tensor:
        averaged.append(stored)
        return mean_row(stored, old)

    def counted_tensor(reader: TensorReader, name: str) -> torch.Tensor:
        asked.append(name)
        return tensor(reader, name)

    monkeypatch.setattr(weights, "mean_row", counted_mean)
    monkeypatch.setattr(TensorReader, "tensor", counted_tensor)
    load_weights(engine, saved, "--model_path", new_rows=NewRows(range(490), [495]))
    assert asked.count("lm_head.weight") > 2
    assert len(averaged) == 2, "the embedding's and the head's"


def test_progress_is_a_line_now_and_then(engine, saved, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    load_weights(engine, saved, "--model_path")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"weights of {saved}, 100%")
    percent = [int(line.split(", ")[1].rstrip("%")) for line in lines]
    assert percent == sorted(percent) and percent[0] < 50
    load_weights(engine, saved, "--model_path", progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("lazy", [False, True])
def test_a_tied_head_is_the_embedding(lazy):
    """The initialisation that is left out would have tied them: they were trained apart."""
    from colossalai.lazy import LazyInitContext

    config = LlamaConfig(**MODEL, tie_word_embeddings=True)
    model = build_model(config, torch.bfloat16, 1, torch.device("cpu"), lazy)
    if lazy:
        model = LazyInitContext.materialize(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
