"""What the words of `-d` mean, and which of them are refused."""

from pathlib import Path

import pytest

from llama_lib.data.entries import Entry, parse_entries, parse_entry
from llama_lib.errors import UserError


@pytest.mark.parametrize(
    ("text", "name", "limit", "weight"),
    [
        ("a.jsonl", "a.jsonl", None, None),
        ("a.jsonl[5000]", "a.jsonl", 5000, None),
        ("a.jsonl:0.7", "a.jsonl", None, 0.7),
        ("a.jsonl[5000]:0.7", "a.jsonl", 5000, 0.7),
        ("data/*.jsonl[10]:3", "data/*.jsonl", 10, 3.0),
        ("a:.5", "a", None, 0.5),
        ("a:1e-3", "a", None, 0.001),
        ("a[007]", "a", 7, None),
        # Configurations of the hub come after a colon too, and some are numbers.
        ("org/name:en", "org/name:en", None, None),
        ("org/name:en:0.3", "org/name:en", None, 0.3),
        ("org/name:en[9]:0.3", "org/name:en", 9, 0.3),
        ("org/name:2020_01", "org/name:2020_01", None, None),
        ("org/name:20220301.en", "org/name:20220301.en", None, None),
        ("org/name:2020:1", "org/name:2020", None, 1.0),
        # A class of characters in a glob is no limit where it stands inside, or is no number.
        ("part-[01].jsonl", "part-[01].jsonl", None, None),
        ("part-[ab]", "part-[ab]", None, None),
        ("sample", "sample", None, None),
        ("C:\\data", "C:\\data", None, None),
    ],
)
def test_words(text: str, name: str, limit: int | None, weight: float | None) -> None:
    assert parse_entry(text) == Entry(name, limit, weight, text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a[]", r"\[\] is no number of documents"),
        ("a[0]", r"\[0\] is no number of documents"),
        ("a[-5]", r"\[-5\] is no number of documents"),
        ("a[10k]", r"\[10k\] is no number of documents"),
        ("a[1,000]", r"\[1,000\] is no number of documents"),
        ("a[0]:0.5", r"\[0\] is no number of documents"),
        ("a:0", "weight 0 is no share"),
        ("a:0.0", r"weight 0\.0 is no share"),
        ("a:-1", "weight -1 is no share"),
        ("a:nan", "weight nan is no share"),
        ("a:inf", "weight inf is no share"),
        ("a:1e999", "weight 1e999 is no share"),
        ("a:0.5[10]", r"-d 'a\[10\]:0\.5'"),
        ("", "names no dataset"),
        ("[5]", "names no dataset"),
        (":0.5", "names no dataset"),
        (" ", "names no dataset"),
    ],
)
def test_refusals(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse_entry(text)


def test_a_path_that_exists_is_meant_by_its_whole_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run[3]", "run:0.5", "run[3]:0.5", "x[0]"):
        Path(name).mkdir()
        assert parse_entry(name) == Entry(name, None, None, name)
    # and may itself be followed by a limit and a weight
    assert parse_entry("run[3]:2") == Entry("run[3]", None, 2.0, "run[3]:2")
    assert parse_entry("run:0.5[7]") == Entry("run:0.5", 7, None, "run:0.5[7]")
    assert parse_entry("x[0][4]:1") == Entry("x[0]", 4, 1.0, "x[0][4]:1")
    assert parse_entry("other[3]") == Entry("other", 3, None, "other[3]")


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a[1]").touch()
    assert parse_entry("~/a[1]").name == "~/a[1]"


def test_a_glob_that_ends_in_a_range_and_matches(tmp_path: Path) -> None:
    (tmp_path / "part-3").mkdir()
    assert parse_entry(f"{tmp_path}/part-[0-9]").name == f"{tmp_path}/part-[0-9]"
    with pytest.raises(UserError, match="is no number of documents"):
        parse_entry(f"{tmp_path}/absent-[0-9]")


def test_weights_for_all_or_for_none() -> None:
    assert [entry.weight for entry in parse_entries(["a:7", "b:0.3"])] == [7.0, 0.3]
    assert [entry.weight for entry in parse_entries(["a[5]", "b"])] == [None, None]
    with pytest.raises(UserError, match=r"-d a:0\.7 with a weight and b without.*b:0\.5, or none"):
        parse_entries(["a:0.7", "b"])


def test_one_word_and_no_word() -> None:
    assert parse_entries("a[5]") == [Entry("a", 5, None, "a[5]")]
    assert parse_entries([]) == []


def test_the_same_data_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"-d a\[5\] and -d a\[9\] name the same data"):
        parse_entries(["a[5]", "a[9]"])
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    with pytest.raises(UserError, match="name the same data"):
        parse_entries(["data:1", "./data/:2"])
    with pytest.raises(UserError, match="name the same data"):
        parse_entries(["data", str(tmp_path / "data")])


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(UserError) as caught:
        parse_entries(["a:0", "b[]", "c", "c"])
    assert len(caught.value.problems) == 3
