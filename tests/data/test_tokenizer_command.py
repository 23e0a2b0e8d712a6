"""`python -m llama_lib tokenizer`: what it refuses, counts and says."""

import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llama_lib.data import tokenizer_command
from llama_lib.data.sources import resolve
from llama_lib.data.tokenizer_command import Corpus, main
from llama_lib.data.train_tokenizer import STYLES
from llama_lib.errors import UserError
from tests.data.conftest import WriteJsonl


def test_wrong_arguments_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    flags = ["--style", "gpt2", "--sample_ratio", "0", "--character_coverage", "1.5"]
    with pytest.raises(UserError) as caught:
        main(["--output", str(tmp_path / "out"), *flags, "--report_mib", "-1", "-d", "sample[5]"])
    problems = caught.value.problems
    assert len(problems) == 6
    for problem, words in zip(
        problems,
        [
            "expected sample. Draw",
            "not empty",
            "expected one of llama2, llama3",
            "--sample_ratio 0.0",
            "1.5",
            "-1.0",
        ],
        strict=True,
    ):
        assert words in problem
    assert (tmp_path / "out" / "kept").read_text() == "kept"


def test_vocabularies_too_small_are_refused(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    data = write_jsonl("text.jsonl", ["abc abc"])
    run = ["--input", str(data), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"--vocab_size 261 is too small: 256 bytes.* least 262"):
        main([*run, "--vocab_size", "261"])
    with pytest.raises(UserError, match=r"--vocab_size 264 .* 4 characters need at least 265"):
        main([*run, "--vocab_size", "264", "--style", "llama2"])
    for style, least in (("llama2", 265), ("llama3", 262)):
        output = ["--output", str(tmp_path / style), "--vocab_size", str(least)]
        assert main(["--input", str(data), *output, "--style", style]) == 0
        assert len(AutoTokenizer.from_pretrained(tmp_path / style)) == least


@pytest.mark.parametrize("style", STYLES)
def test_input_without_text_is_refused(tmp_path: Path, write_jsonl: WriteJsonl, style: str) -> None:
    data = write_jsonl("text.jsonl", ["", ""])
    run = ["--input", str(data), "--style", style, "--vocab_size", "400"]
    with pytest.raises(UserError, match=r"no text .*--input"):
        main([*run, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("style", STYLES)
def test_bad_lines_are_named_or_counted(
    tmp_path: Path, write_jsonl: WriteJsonl, style: str
) -> None:
    data = write_jsonl("text.jsonl", ["some words here", "and there"])
    data.write_text(data.read_text() + '{"text": broken\n' + '{"text": "more words"}\n')
    run = ["--input", str(data), "--style", style, "--vocab_size", "300"]
    run += ["--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"text\.jsonl.*line 3"):
        main(run)
    assert not (tmp_path / "out").exists()
    assert main([*run, "--skip_bad_lines"]) == 0
    source = json.loads((tmp_path / "out" / "report.json").read_text())["sources"]["text"]
    assert (source["documents"], source["bad_lines"]) == (3, 1)


def test_ready_made_rows_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"input_ids": [[1, 2, 3]]}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet holds ready-made rows"):
        main(["--input", str(tmp_path / "rows.parquet"), "--output", str(tmp_path / "out")])


def test_too_little_text_is_said(
    tmp_path: Path, write_jsonl: WriteJsonl, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl("text.jsonl", ["abc abc"])
    main(["-d", str(data), "--vocab_size", "5000", "--output", str(tmp_path / "out")])
    size = len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert f"the text gives no more than {size} of 5000 ids" in capsys.readouterr().out
    # No style is named: it is llama3.
    assert AutoTokenizer.from_pretrained(tmp_path / "out").bos_token == "<|begin_of_text|>"


def test_sample_ratio_draws_documents_by_their_text(
    tmp_path: Path, write_jsonl: WriteJsonl
) -> None:
    texts = [f"document number {n}" for n in range(2000)]
    one = Corpus(resolve(str(write_jsonl("a.jsonl", texts)), tmp_path), sample_ratio=0.25)
    other = Corpus(resolve(str(write_jsonl("b.jsonl", texts[::-1])), tmp_path), sample_ratio=0.25)
    drawn = list(one.texts())
    assert drawn == list(one.texts()) == list(other.texts())[::-1]
    # Four standard deviations of a binomial draw.
    assert abs(len(drawn) - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5
    assert one.counts["a"]["documents"] == len(drawn)
    assert one.counts["a"]["bytes"] == sum(map(len, drawn))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that must not be read."""

    def reads(*_: object, **__: object) -> None:
        pytest.fail("the text was read before the problem was told")

    monkeypatch.setattr(tokenizer_command.Corpus, "texts", reads)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("style", "size", "least"), [("llama2", 261, 262), ("llama3", 261, 262), ("llama2", -1, 262)]
)
def test_size_below_any_texts_need_is_refused_before_reading(
    tmp_path: Path, style: str, size: int, least: int
) -> None:
    run = ["--style", style, f"--vocab_size={size}", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=f"--vocab_size {size} is too small.*at least {least}"):
        main(["--input", str(tmp_path / "not looked at.jsonl"), *run])


@pytest.mark.usefixtures("unread")
def test_output_that_cannot_be_written_is_refused_before_reading(
    tmp_path: Path, write_jsonl: WriteJsonl
) -> None:
    data = write_jsonl("text.jsonl", ["some text"])
    for output in (data / "out", data / "deep" / "out", Path("/proc/none/out")):
        with pytest.raises(UserError, match=rf"--output {output} cannot be written"):
            main(["--input", str(data), "--output", str(output)])
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.usefixtures("unread")
def test_output_that_is_a_mounted_volume_is_refused_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's empty volume: a folder cannot be renamed to it."""
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(UserError, match="is where a disk begins: choose a folder inside"):
        main(["--output", str(tmp_path)])


@pytest.mark.usefixtures("unread")
@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_locked_output_is_refused_before_reading(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    data = write_jsonl("text.jsonl", ["some text"])
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"cannot be written: .*Permission denied"):
        main(["--input", str(data), "--output", str(tmp_path / "locked" / "out")])


def test_checking_the_output_leaves_nothing_behind(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    data = write_jsonl("text.jsonl", ["", ""])
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "new" / "deep" / "out", tmp_path / "empty"):
        with pytest.raises(UserError, match="no text"):
            main(["--input", str(data), "--vocab_size", "300", "--output", str(output)])
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "empty", data]


def test_output_in_the_home_folder_and_behind_a_link(
    tmp_path: Path, write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl("text.jsonl", ["some text"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["--input", str(data), "--vocab_size", "300", "--output=~/new/mine"]) == 0
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    assert main(["--input", str(data), "--vocab_size", "300", "--output", "link"]) == 0
    for folder in ("new/mine", "link"):
        assert len(AutoTokenizer.from_pretrained(tmp_path / folder)) <= 300
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "link",
        "new",
        "target",
        "text.jsonl",
    ]
