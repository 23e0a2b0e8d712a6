"""What a user can get wrong ends at once: exit code 2, one message, nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pretrain
from llama_lib import preflight
from llama_lib.checkpoint.manifest import MANIFEST
from llama_lib.config import dump_yaml, parse_options
from llama_lib.data.tokenizer import save_tokenizer, train_tokenizer
from llama_lib.models import MODELS, model_config
from llama_lib.option_tree import PLUGINS
from tests.refused import Attempt, Command, attempt_of, command_of, everything_in, missing_from

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a right run needs: text.jsonl and the tokenizer `small` of 300 ids."""
    folder = tmp_path_factory.mktemp("words")
    texts = [f"the cat sat on mat number {i}, and so did the other {i * 7} cats" for i in range(99)]
    save_tokenizer(train_tokenizer(texts, 300), folder / "small")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


@pytest.fixture
def command(
    tmp_path: Path,
    words: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Command:
    """pretrain.py, with right values for what is left out."""
    monkeypatch.chdir(tmp_path)
    right = {
        "-c": "tiny",
        "-l": "32",
        "-d": f"{words / 'text.jsonl'}",
        "--tokenizer": f"{words / 'small'}",
        "--cache_dir": "cache",
    }
    return command_of(pretrain.main, right, capsys, monkeypatch)


@pytest.fixture
def attempt(command: Command, tmp_path: Path) -> Attempt:
    """The message of a command that has to be refused."""
    return attempt_of(command, tmp_path)


def test_without_a_mistake_the_same_command_is_accepted(command, tmp_path):
    ended = command("--check")
    assert (ended.code, everything_in(tmp_path)) == (0, [])
    assert "tokens per step" in ended.out


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["-p", "zero3"], ["zero3", *PLUGINS, "did you mean zero2?"]),
        (["-c", "llama2-7"], ["llama2-7", *MODELS, "did you mean --config llama2-7b?"]),
        (["--epochs", "2"], ["--epochs", "did you mean --num_epochs?"]),
        (["-lr", "1"], ["-lr", "did you mean --lr?"]),
        (["--lr", "high"], ["'high'", "a number above 0"]),
        (["--spec_file", "none.yaml"], ["none.yaml", "No such file"]),
        (["--seed", "4294967296"], ["--seed 4294967296", "below 2^32"]),
    ],
)
def test_unknown_names_and_values(attempt, argv, parts):
    assert missing_from(attempt(*argv), *parts) == []


def test_unknown_key_of_a_file(attempt, tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-3\nsave_intervall: 5\n")
    message = attempt("--spec_file", "run.yaml")
    assert missing_from(message, "run.yaml", "learning_rate", "did you mean save_interval?") == []


# -- data ---------------------------------------------------------------------------------------

TEXT = '{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.jsonl", "", ["empty.jsonl", "is empty"]),
        ("blank.jsonl", "\n\n", ["blank.jsonl", "is empty"]),
        ("notes.txt", "hello", ["notes.txt", "expected one of .jsonl"]),
        (
            "column.jsonl",
            '{"body": "x", "id": 1}\n',
            ["column.jsonl", "no `text`", "found body, id"],
        ),
        ("a.jsonl", '{"body": "x"}\n', ['Expected lines like {"text": ']),
        ("bad.jsonl", TEXT * 2 + "{broken\n" + TEXT, ["bad.jsonl line 3", "--skip_bad_lines"]),
        ("bad.json", '[{"text": "a"},\n{"text": }]', ["bad.json line 2", "invalid JSON"]),
        ("number.jsonl", TEXT + '{"text": 7}\n', ["number.jsonl line 2", "not a string"]),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', ["latin.jsonl", "line 1", "not UTF-8"]),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00cut", ["cut.jsonl.gz", "cannot be read"]),
        ("table.parquet", "PAR", ["table.parquet", "no parquet file"]),
    ],
)
def test_bad_text(attempt, tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert missing_from(attempt("-d", name), *parts) == []


@pytest.mark.parametrize(
    ("dataset", "parts"),
    [
        ("missing.jsonl", ["missing.jsonl", "no such file"]),
        ("nowhere/*.jsonl", ["nowhere/*.jsonl", "no file matches"]),
        ("empty_folder", ["empty_folder", "holds no data", "expected .jsonl"]),
        ("unfinished", ["unfinished", "no manifest.json"]),
    ],
)
def test_missing_data(attempt, tmp_path, dataset, parts):
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "text.idx").write_bytes(b"MMIDIDX")
    assert missing_from(attempt("-d", dataset), *parts) == []


STREAM = ["--streaming", "--max_steps", "5"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["-d", "text.jsonl[0]"], ["text.jsonl[0]", "whole number from 1"]),
        (["-d", "a.jsonl:0.5", "b.jsonl"], ["a.jsonl:0.5", "b.jsonl", "every dataset a weight"]),
        (["-d", "a.jsonl:-1"], ["a.jsonl:-1", "above 0"]),
        (["--eval_data", "x.jsonl", "x.jsonl[5]"], ["x.jsonl", "name the same data"]),
        (["--eval_data", "x.jsonl[5]"], ["--eval_data x.jsonl[5]", "takes no [N]"]),
        ([*STREAM, "--eval_data", "x.jsonl[5]"], ["--eval_data x.jsonl[5]", "takes no [N]"]),
        (["--packing", "first_fit"], ["first_fit", "concat, best_fit"]),
        (["--skip_steps", "5"], ["--skip_steps", "START:STOP"]),
        (["--streaming"], ["--streaming needs --max_steps or --max_tokens"]),
        ([*STREAM, "-e", "2"], ["--num_epochs has no meaning with --streaming"]),
        ([*STREAM, "--packing", "best_fit"], ["--packing best_fit", "leave out --streaming"]),
        ([*STREAM, "--eval_ratio", "0.1"], ["--eval_ratio 0.1", "--eval_data"]),
        ([*STREAM, "-d", "text.jsonl[10]"], ["text.jsonl[10]", "prepare the data first"]),
    ],
)
def test_data_options_that_cannot_be_met(attempt, argv, parts):
    assert missing_from(attempt(*argv), *parts) == []


@pytest.mark.parametrize("stream", [[], STREAM])
def test_shares_and_held_out_text_together(command, words, stream):
    text = (words / "text.jsonl").read_text()
    for name in ("a", "b", "held_out"):
        Path(f"{name}.jsonl").write_text(text.replace("cats", f"cats {name}"))
    argv = ["-d", "a.jsonl:0.7", "b.jsonl:0.3", "--eval_data", "held_out.jsonl"]
    ended = command(*argv, *stream, "--check")
    assert ended.code == 0, ended.err


def test_a_run_goes_on_with_its_own_specs(command):
    """The file of a run holds every option, defaults included, which nobody typed."""
    parsed = parse_options("pretrain", [*STREAM, "-d", "sample"])
    dump_yaml(parsed, "specs.yaml")
    ended = command("--spec_file", "specs.yaml", "--check")
    assert ended.code == 0, ended.err
    dump_yaml(parse_options("pretrain", ["-d", "sample"]), "specs.yaml")
    ended = command("--spec_file", "specs.yaml", "--check")
    assert ended.code == 0, ended.err
    assert "is ignored" not in ended.out


def test_rows_do_not_say_where_documents_end(command, words):
    """--document_mask with ready-made rows is refused; it needs the data opened to know."""
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.table({"input_ids": [[1, 5, 6, 2] * 8] * 99})
    pyarrow.parquet.write_table(rows, "rows.parquet")
    ended = command("-d", "rows.parquet", "--document_mask")
    assert (ended.code, ended.out) == (2, "")
    assert missing_from(ended.err, "--document_mask", "ready-made rows", "best_fit") == []
    assert command("-d", "rows.parquet", "--check").code == 0
    ended = command("-d", "rows.parquet", "--document_mask", *STREAM)
    assert (ended.code, ended.out) == (2, "")
    assert "ready-made rows" in ended.err


def test_less_than_one_batch(command):
    # Only tokenising can tell how much there is, so the prepared text stays in the cache.
    ended = command("-b", "4096")
    assert (ended.code, ended.out) == (2, "")
    assert missing_from(ended.err, "less than one global batch of 4096", "--batch_size") == []


# -- model and tokenizer ------------------------------------------------------------------------


def write_config(folder: Path, **changes: int) -> Path:
    config = model_config("tiny")
    config.update(changes)
    config.save_pretrained(folder)
    return folder / "config.json"


def test_tokenizer_larger_than_the_model(attempt, tmp_path):
    path = write_config(tmp_path, vocab_size=299)
    message = attempt("-c", str(path))
    assert missing_from(message, "300 ids", "vocab_size is 299", "--tokenizer", "--config") == []


def test_no_tokenizer_there(attempt):
    message = attempt("--tokenizer", "./nowhere")
    assert missing_from(message, "./nowhere", "tokenizer.json", "--tokenizer") == []


def test_max_length_over_the_context(attempt):
    assert missing_from(attempt("-l", "513"), "--max_length 513", "context of 512") == []


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{", ["config.json", "not a model configuration"]),
        ('{"model_type": "bert"}', ["'bert'", "llama, mistral"]),
    ],
)
def test_bad_model_configuration(attempt, tmp_path, content, parts):
    (tmp_path / "config.json").write_text(content)
    assert missing_from(attempt("-c", "config.json"), *parts) == []


def test_no_weights_there(attempt):
    assert missing_from(attempt("--model_path", "./nowhere"), "--model_path ./nowhere") == []


# -- batch and layout ---------------------------------------------------------------------------

HYBRID = ["-p", "hybrid_parallel"]


@pytest.mark.parametrize(
    ("processes", "argv", "parts"),
    [
        (1, ["--global_batch_tokens", "100"], ["not a multiple", "= 64", "64 or 128"]),
        (1, ["--global_batch_tokens", "32"], ["not a multiple", "nearest valid: 64"]),
        (1, ["--max_tokens", "63"], ["--max_tokens 63", "one step of 64"]),
        (1, ["--microbatch_size", "1"], ["--microbatch_size", "--pp above 1"]),
        (1, [*HYBRID, "--microbatch_size", "1"], ["--microbatch_size", "--pp above 1"]),
        (
            2,
            [*HYBRID, "--pp", "2", "-b", "6", "--microbatch_size", "4"],
            ["--batch_size 6", "valid values: [1, 2, 3, 6]"],
        ),
        (2, [*HYBRID, "--pp", "2", "-b", "1"], ["at least 2 micro-batches", "--batch_size"]),
        (1, ["-p", "zero2", "--tp", "2"], ["--tp 2 needs -p hybrid_parallel"]),
        (2, ["-p", "gemini", "--tp", "2"], ["--tp 2", "miscounts the gradient norm"]),
        (3, [*HYBRID, "--tp", "3"], ["8 attention heads", "4 key-value heads", "[1, 2, 4]"]),
        (5, [*HYBRID, "--pp", "5", "-b", "5"], ["4 layers", "valid values: 1 to 4"]),
        (3, [*HYBRID, "--tp", "2"], ["3 process(es)", "multiples of 2", "among [1, 3]"]),
        (1, [*HYBRID, "--tp", "2"], ["1 process(es)", "multiples of 2"]),
        (2, [*HYBRID, "--sp", "2"], ["--sp 2 needs --sp_mode", "all_to_all, split_gather"]),
        (2, [*HYBRID, "--sp", "2", "--sp_mode", "ring"], ["ring is refused", "gradient norm"]),
        (2, [*HYBRID, "-x", "fp32", "--zero_stage", "1"], ["--zero_stage 0"]),
        (2, ["-p", "zero2", "--offload_optim_frac", "0.5"], ["belongs to -p gemini"]),
        (
            2,
            [*HYBRID, "--sp", "2", "--sp_mode", "all_to_all", "--document_mask"],
            ["--document_mask", "--sp_mode"],
        ),
    ],
)
def test_batch_or_layout_that_does_not_fit(attempt, processes, argv, parts):
    assert missing_from(attempt(*argv, processes=processes), *parts) == []


def test_rows_of_uneven_length_under_sequence_parallelism(attempt):
    argv = [*HYBRID, "--sp", "2", "--sp_mode", "all_to_all", "-l", "31"]
    assert "--max_length 31 is not divisible into 2 parts" in attempt(*argv, processes=2)


# -- precision and kernels ----------------------------------------------------------------------


@pytest.mark.parametrize("plugin", ["gemini", "gemini_auto"])
def test_gemini_in_fp32_on_a_gpu(attempt, monkeypatch, plugin):
    monkeypatch.setattr(preflight, "has_accelerator", lambda: True)
    message = attempt("-p", plugin, "-x", "fp32")
    assert missing_from(message, f"-p {plugin}", "fp32", "-x bf16", "-p zero2") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_flash_attention_without_a_gpu(attempt):
    assert missing_from(attempt("-a"), "-a", "needs a GPU", "SDPA") == []


# -- checkpoints --------------------------------------------------------------------------------


def test_load_of_a_hugging_face_folder(attempt, tmp_path):
    write_config(tmp_path / "served")
    message = attempt("--load", "served")
    assert missing_from(message, "Hugging Face", "--model_path served", "step-XXXXXXXX") == []


def test_load_of_nothing(attempt, tmp_path):
    (tmp_path / "checkpoint" / "step-00000007").mkdir(parents=True)
    message = attempt("--load", "checkpoint/step-00000008")
    assert missing_from(message, "no such directory", "step-00000007", "--load auto") == []


def test_load_of_a_folder_of_checkpoints(attempt, tmp_path):
    (tmp_path / "runs" / "step-00000007").mkdir(parents=True)
    message = attempt("--load", "runs")
    assert missing_from(message, "step-00000007", "--save_dir runs --load auto") == []


def test_another_run_is_never_written_over(attempt, tmp_path):
    checkpoint = tmp_path / "checkpoint" / "step-00000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text("{}")
    message = attempt()
    assert missing_from(message, "already holds 1", "step-00000007", "--load auto") == []


# -- folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--save_dir", "--tensorboard_dir"])
@pytest.mark.parametrize("place", ["file/out", "/proc/nowhere/out"])
def test_no_place_to_write(attempt, tmp_path, flag, place):
    (tmp_path / "file").write_text("")
    message = attempt(flag, place)
    assert missing_from(message, f"{flag} {place}", "cannot be written to", "another folder") == []


def test_no_place_for_the_cache(attempt, tmp_path):
    (tmp_path / "file").write_text("")
    assert missing_from(attempt("--cache_dir", "file/cache"), "file/cache", "--cache_dir") == []


@pytest.fixture
def modes_bind(tmp_path: Path) -> None:
    locked = tmp_path / "modes"
    locked.mkdir(mode=0)
    bind = not os.access(locked, os.W_OK)
    locked.rmdir()
    if not bind:
        pytest.skip("modes do not bind this user (root)")


@pytest.mark.parametrize("flag", ["--save_dir", "--tensorboard_dir", "--cache_dir"])
def test_no_permission_to_write(modes_bind, attempt, tmp_path, flag):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert missing_from(attempt(flag, "locked/out"), flag, "locked/out", "ermission denied") == []


def test_no_permission_to_read(modes_bind, attempt, tmp_path):
    (tmp_path / "mine.jsonl").write_text(TEXT)
    (tmp_path / "mine.jsonl").chmod(0)
    assert "mine.jsonl" in attempt("-d", "mine.jsonl")


# -- all at once --------------------------------------------------------------------------------


def test_all_mistakes_of_a_command_line_are_shown_together(attempt):
    message = attempt("-p", "zero3", "--epochs", "2", "--lr", "high", "-b", "0")
    assert missing_from(message, "zero3", "--epochs", "'high'", "batch_size") == []
    assert len(message.splitlines()) == 4


def test_all_mistakes_of_a_run_are_shown_together(attempt, tmp_path):
    (tmp_path / "file").write_text("")
    message = attempt(
        *["-d", "missing.jsonl", "-l", "1024", "--save_dir", "file/out", "--load", "nowhere"],
        *[*HYBRID, "--tp", "3"],
    )
    parts = ["missing.jsonl", "--max_length 1024", "file/out", "--load nowhere", "--tp 3"]
    assert missing_from(message, *parts) == []


def test_an_unknown_model_does_not_hide_the_rest(attempt, tmp_path):
    (tmp_path / "file").write_text("")
    message = attempt("-c", "8b", "-d", "missing.jsonl", "--save_dir", "file/out")
    assert missing_from(message, "'8b'", "missing.jsonl", "file/out") == []


# -- as a user runs it --------------------------------------------------------------------------


def run_pretrain(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "pretrain.py"), *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_real_process_ends_with_code_2_and_leaves_nothing(tmp_path):
    done = run_pretrain(tmp_path, "-c", "tiny", "-p", "zero3", "--epochs", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_real_process_that_meets_bad_text(words, tmp_path):
    (tmp_path / "bad.jsonl").write_text(TEXT + "{broken\n")
    done = run_pretrain(
        tmp_path,
        *["-c", "tiny", "-d", "bad.jsonl", "--tokenizer", str(words / "small")],
        *["--cache_dir", "cache"],
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "bad.jsonl line 2: invalid JSON" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "cache"]
    assert not list(tmp_path.glob("cache/prepared/*"))
