"""`generate` and `evaluate` against transformers itself, and what they refuse."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama_lib.__main__ import main
from llama_lib.checkpoint.manifest import MANIFEST
from llama_lib.cli import run_command
from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.tokenizer import save_tokenizer, train_tokenizer
from llama_lib.inference import model_folder

TEXTS = {
    "cats": [f"the cat sat on mat {i}, and so did the other {i * 7} cats" for i in range(30)],
    "dogs": [f"dog number {i} barked at {i % 5} of the neighbours" for i in range(11)],
}
CONTEXT = 64


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a random Llama with large weights, so its choices are clear ones."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer((text for part in TEXTS.values() for text in part), 300)
    save_tokenizer(tokenizer, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, texts in TEXTS.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def printed_losses(text: str) -> dict[str, tuple[float, int]]:
    rows = re.findall(r"^(\S+): ([\d.]+) nats per token over ([\d,]+) tokens$", text, re.M)
    return {name: (float(loss), int(count.replace(",", ""))) for name, loss, count in rows}


def loss_by_transformers(model_dir: Path, texts: list[str], length: int) -> tuple[float, int]:
    """(summed loss, labels): documents ended by EOS, joined, cut into rows of `length` ids."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = LlamaForCausalLM.from_pretrained(model_dir).eval()
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    total, count = 0.0, 0
    for first in range(0, len(stream), length):
        row = torch.tensor([stream[first : first + length]])
        if row.shape[1] > 1:
            with torch.no_grad():
                total += model(row, labels=row).loss.item() * (row.shape[1] - 1)
            count += row.shape[1] - 1
    return total, count


@pytest.mark.parametrize("length", [None, 24])
def test_evaluate_is_the_loss_transformers_computes(model_dir, data_dir, tmp_path, capsys, length):
    argv = ["evaluate", str(model_dir), "-d", str(data_dir), "--cache_dir", str(tmp_path / "c")]
    assert main(argv + ([] if length is None else ["-l", str(length)])) == 0
    printed = printed_losses(capsys.readouterr().out)
    parts = {
        name: loss_by_transformers(model_dir, texts, length or CONTEXT)
        for name, texts in TEXTS.items()
    }
    parts["all"] = tuple(map(sum, zip(*parts.values(), strict=True)))
    assert printed.keys() == parts.keys()
    for name, (total, count) in parts.items():
        assert printed[name] == (pytest.approx(total / count, abs=1e-4), count)


def test_evaluate_takes_prepared_data_and_a_number_of_batches(
    model_dir, data_dir, tmp_path, capsys
):
    prepared = prepare(
        PrepareRequest([str(data_dir)], str(model_dir), eval_ratio=0.0, cache_dir=tmp_path)
    )
    argv = ["evaluate", str(model_dir), "-d", str(prepared.path), "--cache_dir", str(tmp_path)]
    assert main([*argv, "-l", "16", "-b", "3", "--max_batches", "2"]) == 0
    printed = printed_losses(capsys.readouterr().out)
    assert {name: count for name, (_, count) in printed.items()} == {
        "cats": 6 * 15,
        "dogs": 6 * 15,
        "all": 12 * 15,
    }


def test_generate_without_temperature_is_greedy_decoding(model_dir, capsys):
    argv = ["generate", str(model_dir), "--prompt", "the cat", "--max_new_tokens", "12"]
    assert main([*argv, "--temperature", "0"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = LlamaForCausalLM.from_pretrained(model_dir)
    inputs = tokenizer("the cat", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(expected[0], skip_special_tokens=True)
    assert capsys.readouterr().out == text + "\n"
    assert len(expected[0]) > len(inputs.input_ids[0])


def test_generate_repeats_a_text_for_its_seed(model_dir, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        main(["generate", str(model_dir), "--prompt", "dog", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_begins_a_document(model_dir, capsys):
    assert main(["generate", str(model_dir), "--prompt", "", "--max_new_tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()


# -- which model --------------------------------------------------------------------------------


def make_checkpoint(save_dir: Path, step: int, finished: bool = True) -> Path:
    checkpoint = save_dir / f"step-{step:08d}"
    (checkpoint / "model").mkdir(parents=True)
    (checkpoint / "model" / "config.json").write_text("{}")
    if finished:
        (checkpoint / MANIFEST).write_text("{}")
    return checkpoint


def test_a_checkpoint_or_the_newest_finished_one(tmp_path):
    old, new = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 15, finished=False)
    assert model_folder(str(old)) == old / "model"
    assert model_folder(str(tmp_path)) == new / "model"
    assert model_folder(str(new / "model")) == new / "model"


# -- what is refused ----------------------------------------------------------------------------


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    assert run_command(main, argv) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "x"], ["evaluate", "-d", "sample"]], ids=lambda c: c[0]
)
def test_no_model_there(tmp_path, capsys, command):
    name, *others = command
    assert "no model here" in refused([name, str(tmp_path / "none"), *others], capsys)
    unfinished = make_checkpoint(tmp_path, 5, finished=False)
    message = refused([name, str(unfinished), *others], capsys)
    assert "complete.json" in message and "did not finish" in message


def test_damaged_or_missing_files_of_a_model(model_dir, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    argv = ["generate", str(folder), "--prompt", "x"]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in refused(argv, capsys, code=1)
    weights.unlink()
    assert "cannot be loaded" in refused(argv, capsys)
    shutil.copy(model_dir / weights.name, folder)
    for path in folder.glob("*token*"):
        path.unlink()
    assert "no tokenizer can be loaded" in refused(argv, capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-l", "1"], "expected 2 to 64"),
        (["-l", "65"], "expected 2 to 64"),
        (["-b", "0"], "at least 1"),
        (["--max_batches", "0"], "at least 1"),
        (["-d", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_bad_arguments_of_evaluate(model_dir, data_dir, tmp_path, capsys, argv, message):
    start = ["evaluate", str(model_dir), "-d", str(data_dir), "--cache_dir", str(tmp_path / "c")]
    assert message in refused([*start, *argv], capsys)


@pytest.mark.parametrize("argv", [["--max_new_tokens", "0"], ["--temperature", "-1"]])
def test_bad_arguments_of_generate(model_dir, capsys, argv):
    assert "--max_new_tokens" in refused(
        ["generate", str(model_dir), "--prompt", "x", *argv], capsys
    )


def test_data_prepared_with_another_tokenizer(model_dir, data_dir, tmp_path, capsys):
    save_tokenizer(train_tokenizer(TEXTS["dogs"], 280), tmp_path / "other")
    prepared = prepare(
        PrepareRequest([str(data_dir)], str(tmp_path / "other"), cache_dir=tmp_path / "c")
    )
    argv = ["evaluate", str(model_dir), "-d", str(prepared.path), "--cache_dir", str(tmp_path)]
    capsys.readouterr()
    assert "another tokenizer" in refused(argv, capsys)
