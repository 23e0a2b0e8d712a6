"""Budgets, mixtures and the cutting of rows, against numbers published and a plain loop."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml

from llama_lib.data.budget import Budget, RowCutter, parse_budgets, quotas
from llama_lib.data.mixture import MIXTURES, entry_of, load_mixture
from llama_lib.errors import UserError


def problems(caught: pytest.ExceptionInfo[UserError]) -> list[str]:
    return caught.value.problems


@pytest.fixture
def mixture_file(tmp_path: Path) -> Path:
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"book": 60, "c4": 40}))
    return path


def test_budgets_are_exact() -> None:
    assert parse_budgets(["8192:1.8b", "16384:200m"]) == {8192: 1_800_000_000, 16384: 200_000_000}
    assert parse_budgets(["8192:2B", "4:.5K", "5:7"]) == {8192: 2 * 10**9, 4: 500, 5: 7}
    # 0.7 * 10^12 as a float is 699999999999.9999.
    assert parse_budgets(["8:0.7t"]) == {8: 700_000_000_000}
    assert parse_budgets(["8:1.234567890123t"]) == {8: 1_234_567_890_123}


def test_all_wrong_budgets_are_named_together() -> None:
    wrong = ["8192", "8192:2g", "8192:-1b", "1:1m", "8:1.2345k", "8192:2", ":1b", "8:1.5"]
    with pytest.raises(UserError) as caught:
        parse_budgets(["64:1m", *wrong, "64:2m"])
    messages = problems(caught)
    assert len(messages) == len(wrong) + 1
    for text, message in zip(wrong, messages, strict=False):
        assert repr(text) in message or f"rows of {text.split(':')[0]} " in message
    assert "is the unit missing" in messages[5]
    assert "rows of 64 are given twice" in messages[-1]
    with pytest.raises(UserError, match="got nothing"):
        parse_budgets([])


def test_named_mixtures() -> None:
    for name, total in (("slimpajama", 100), ("even", 99.4), ("code", 100)):
        mixture = load_mixture(name)
        assert sum(mixture.values()) == pytest.approx(total)
        assert len(mixture) == 7
    assert load_mixture("slimpajama")["commoncrawl"] == 52.2
    load_mixture("even")["book"] = 0.0
    assert MIXTURES["even"]["book"] == 14.2


@pytest.mark.parametrize("nested", [False, True])
def test_mixture_files(tmp_path: Path, nested: bool) -> None:
    percents = {"book": 30.5, "my-notes": 69.1, "cc": 0}
    content = {"mixture": percents, "num_tokens_avg": {"book": 89373}} if nested else percents
    (tmp_path / "m.json").write_text(json.dumps(content))
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(content))
    assert load_mixture(str(tmp_path / "m.json")) == percents
    assert load_mixture(str(tmp_path / "m.yaml")) == percents


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 50, "b": 51.5}', "sum to 101.5, expected 100"),
        ('{"a": 98.9}', "sum to 98.9"),
        ("{}", "sum to 0"),
        ('{"a": -1, "b": 101}', "a: got '-1'"),
        ('{"a": true, "b": 99}', "a: got True"),
        ('{"a": NaN, "b": 99}', "a: got nan"),
        ('{"a": "many", "b": 99}', "a: got 'many'"),
        ('{"a": 50, "b": [50]}', "b: got"),
        ('{"mixture": {"a": 100}, "weights": 1, "lengths": 2}', "unknown keys lengths, weights"),
        ('{"a": 50, "a": 50}', "a is given twice"),
        ("[1, 2]", "expected percents by source"),
        ("{", "is no mixture"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_wrong_mixture_files_are_refused(
    tmp_path: Path, content: str, message: str, suffix: str
) -> None:
    path = tmp_path / f"mixture.{suffix}"
    path.write_text(content)
    if suffix == "yaml":  # YAML has no values but texts here
        message = message.replace("True", "'true'").replace("got nan", "got 'NaN'")
    with pytest.raises(UserError) as caught:
        load_mixture(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_mixtures_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_mixture(str(tmp_path / "absent.json"))
    with pytest.raises(UserError, match="expected slimpajama, even, code"):
        load_mixture("slimpyjama")


@pytest.mark.parametrize(
    ("source", "entry"),
    [
        ("book", "book"),
        ("book_sample", "book"),
        ("books", "book"),
        ("books-00001", "book"),
        ("bookcorpus", None),
        ("cc_2019-30_sample", "commoncrawl"),
        ("cc", "commoncrawl"),
        ("commoncrawl.en", "commoncrawl"),
        ("CommonCrawl", "commoncrawl"),
        ("wikipedia_sample", "wiki"),
        ("wiki", "wiki"),
        ("c4.00001", "c4"),
        ("c4x", None),
        ("documentation", None),
    ],
)
def test_entry_of_a_source(source: str, entry: str | None) -> None:
    assert entry_of(source, MIXTURES["even"]) == entry


def test_entry_aliases_work_both_ways_and_the_longest_name_wins() -> None:
    assert entry_of("commoncrawl_2020", {"cc": 100.0}) == "cc"
    assert entry_of("wiki_en", {"wikipedia": 100.0}) == "wikipedia"
    mixture = {"c4": 50.0, "c4_en": 25.0, "cc": 15.0, "commoncrawl": 10.0}
    assert entry_of("c4_en_part", mixture) == "c4_en"
    assert entry_of("c4_de", mixture) == "c4"
    assert entry_of("cc_2020", mixture) == "cc"
    assert entry_of("commoncrawl_2020", mixture) == "commoncrawl"


def test_published_numbers_of_rows() -> None:
    even = quotas(parse_budgets(["8192:100m"]), load_mixture("even"))
    assert set(even) == set(MIXTURES["even"])
    assert all(rows == {8192: 1734} for rows in even.values())
    assert sum(rows[8192] for rows in even.values()) == 12_138
    slimpajama = quotas(parse_budgets(["8192:2b"]), load_mixture("slimpajama"))
    assert sum(rows[8192] for rows in slimpajama.values()) == 244_144


def test_quotas_round_up_exactly() -> None:
    # 10% of 1000 is 100 and no float above it, so one row of 100.
    assert quotas({100: 1000}, {"a": 10.0, "b": 90.0}) == {"a": {100: 1}, "b": {100: 9}}
    assert quotas({100: 1001}, {"a": 10.0, "b": 0.0}) == {"a": {100: 2}, "b": {100: 0}}
    huge = 10**15
    assert quotas({7: huge}, {"a": 14.2})["a"][7] == math.ceil(Fraction(huge * 142, 7000))


def documents(seed: int, count: int, longest: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    for _ in range(count):
        yield random.integers(0, 60_000, random.integers(1, longest), dtype=np.uint16)


def cut(cutter: RowCutter, ids: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The rows of these ids, each with its length."""
    flat, lengths = cutter.cut_flat(ids)
    assert int(lengths.sum()) == len(flat)
    rows = np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []
    return list(zip(lengths.tolist(), rows, strict=True))


def cut_in(pieces: int, stream: np.ndarray, quota: dict[int, int], seed: int = 3) -> RowCutter:
    """A cutter that has been given the stream in so many pieces; its rows in `rows`."""
    cutter = RowCutter(quota, seed, "book")
    rows: list[tuple[int, np.ndarray]] = []
    for piece in np.array_split(stream, pieces):
        rows += cut(cutter, piece)
    cutter.rows = rows  # type: ignore[attr-defined]
    return cutter


def test_rows_are_the_stream_in_order_of_the_drawn_lengths() -> None:
    stream = np.concatenate(list(documents(0, 500, 60)))
    cutter = cut_in(1, stream, {16: 100, 64: 40, 5: 10})
    rows = cutter.rows  # type: ignore[attr-defined]
    assert all(len(ids) == length for length, ids in rows)
    assert all(ids.dtype == np.uint16 for _, ids in rows)
    assert np.array_equal(np.concatenate([ids for _, ids in rows]), stream[: 1600 + 2560 + 50])
    assert Counter(length for length, _ in rows) == {16: 100, 64: 40, 5: 10}
    assert cutter.done and cutter.dropped == 0
    assert cutter.left() == {16: 0, 64: 0, 5: 0} and cutter.made() == {16: 100, 64: 40, 5: 10}
    assert cut(cutter, stream) == []


@pytest.mark.parametrize("pieces", [2, 3, 50, 5000])
def test_rows_do_not_depend_on_how_the_documents_come(pieces: int) -> None:
    stream = np.concatenate(list(documents(1, 9000, 30)))
    # More rows than are drawn at once.
    quota = {7: 6000, 16: 3000, 33: 2000}
    whole = cut_in(1, stream, quota)
    parts = cut_in(pieces, stream, quota)
    assert not whole.done and whole.dropped == parts.dropped
    assert whole.left() == parts.left() and sum(whole.made().values()) > 4096 + 1000
    expected, found = whole.rows, parts.rows  # type: ignore[attr-defined]
    assert len(expected) == len(found)
    for (length, ids), (same_length, same_ids) in zip(expected, found, strict=True):
        assert length == same_length and np.array_equal(ids, same_ids)
    made = sum(length * rows for length, rows in whole.made().items())
    assert made + whole.dropped == len(stream)


def test_a_row_waits_for_its_ids() -> None:
    cutter = RowCutter({4: 2}, 0, "a")
    ids = np.arange(3, dtype=np.int32)
    assert cut(cutter, ids) == [] and cutter.dropped == 3
    ids[:] = 99  # the caller may use its array again
    ((length, row),) = cut(cutter, np.array([3, 4], np.int32))
    assert length == 4 and row.tolist() == [0, 1, 2, 3] and cutter.dropped == 1
    assert cut(cutter, np.empty(0, np.int32)) == []
    assert cutter.left() == {4: 1} and not cutter.done


def test_lengths_come_in_proportion_to_what_is_left() -> None:
    """The mean share of a length in any stretch is its share of the quota, as of a random order."""
    quota = {2: 9000, 3: 1000}
    shares = []
    for seed in range(30):
        cutter = RowCutter(quota, seed, "book")
        _, lengths = cutter.cut_flat(np.zeros(21_000, np.uint16))
        assert len(lengths) == 10_000 and cutter.done
        shares.append([np.mean(part == 3) for part in np.split(lengths, 5)])
    # 60,000 draws in each fifth: three standard deviations are 0.0037.
    assert np.abs(np.mean(shares, axis=0) - 0.1).max() < 0.004
    assert np.std(shares) > 0.003, "every seed gives the same counts: nothing is drawn"


def test_seed_and_source_choose_the_lengths() -> None:
    def lengths(seed: int, name: str) -> list[int]:
        cutter = RowCutter({2: 50, 3: 50}, seed, name)
        return cutter.cut_flat(np.zeros(300, np.uint16))[1].tolist()

    assert lengths(1, "a") == lengths(1, "a")
    assert lengths(1, "a") != lengths(2, "a")
    assert lengths(1, "a") != lengths(1, "b")
    # The order of a dataset prepared years ago: must never change.
    assert lengths(42, "book")[:16] == GOLDEN


GOLDEN = [2, 2, 3, 2, 2, 3, 3, 3, 2, 2, 3, 3, 3, 2, 2, 2]


def test_millions_of_ids_are_cut_at_the_speed_of_memory() -> None:
    ids = np.zeros(20_000_000, np.uint16)
    cutter = RowCutter({8192: 10_000, 16384: 5_000}, 0, "x")
    cutter.cut_flat(ids[:100])
    start = time.process_time()
    cutter.cut_flat(ids)
    seconds = time.process_time() - start
    # Copying 40 MB twice takes about 20 ms; a Python loop over 20 million ids more than a second.
    assert seconds < 0.5


def budget(tmp_path: Path, percents: dict[str, float], sizes: dict[str, float]) -> Budget:
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps(percents))
    return Budget(["10:1k", "20:1k"], str(path), sizes, 42)


def test_budget_from_cutting_to_facts(tmp_path: Path) -> None:
    plan = budget(tmp_path, {"book": 60, "c4": 40}, {"book_sample": 900, "c4": 9e9, "notes": 5})
    assert plan.cutter("notes") is None
    for name, tokens in (("book_sample", 195), ("c4", 5000)):
        cutter = plan.cutter(name)
        assert cutter is not None
        cutter.cut_flat(np.zeros(tokens, np.uint16))
    facts = plan.facts()
    made = {length: rows["made"] for length, rows in facts["rows"]["book"].items()}
    assert 10 * made["10"] + 20 * made["20"] + facts["dropped_tokens"]["book_sample"] == 195
    assert {rows["asked"] for rows in facts["rows"]["book"].values()} == {60, 30}
    assert facts["rows"]["c4"] == {
        "10": {"asked": 40, "made": 40},
        "20": {"asked": 20, "made": 20},
    }
    assert facts["num_token"] == ["10:1k", "20:1k"]
    assert facts["mixture"] == {"book": 60.0, "c4": 40.0}
    assert facts["entries"] == {"book_sample": "book", "c4": "c4", "notes": None}
    json.dumps(facts)
    short = plan.shortfall()
    assert len(short) == 2 and all(line.startswith("book: ") for line in short)
    assert f"{made['10']} of 60 rows of 10 tokens made, {60 - made['10']} short" in short[0]


def test_what_is_expected_to_be_short_is_told_before(tmp_path: Path) -> None:
    sizes = {"book": 4000.0, "c4_a": 1600.0, "c4_b": 1700.0, "notes": 1e9}
    plan = budget(tmp_path, {"book": 60, "c4": 39, "github": 1}, sizes)
    assert plan.expected(bytes_per_token=4.0) == [
        "notes belongs to no entry of the mixture: left out",
        "book: 1,200 tokens are asked for, its text has about 1,000 (83%)",
        "github: 30 tokens are asked for, but there is no source",
    ]
    (line,) = plan.expected(bytes_per_token=1.0)[1:]
    assert line.startswith("github")


def test_sources_of_one_entry_share_it_and_help_each_other(tmp_path: Path) -> None:
    sizes = {"cc_2019": 100.0, "cc_2020": 300.0, "cc_2021": 100.0}
    plan = budget(tmp_path, {"commoncrawl": 100}, sizes)
    asked = {}
    made: Counter[int] = Counter()
    for name, tokens in (("cc_2019", 10_000), ("cc_2020", 0), ("cc_2021", 10_000)):
        cutter = plan.cutter(name)
        assert cutter is not None
        asked[name] = cutter.left()
        cutter.cut_flat(np.zeros(tokens, np.uint16))
        made.update(cutter.made())
    assert asked == {
        "cc_2019": {10: 20, 20: 10},
        "cc_2020": {10: 60, 20: 30},
        "cc_2021": {10: 80, 20: 40},
    }
    assert made == {10: 100, 20: 50}
    assert plan.shortfall() == []


def test_budget_without_mixture_or_without_a_fitting_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --mixture"):
        Budget(["8:1k"], None, {"book": 1.0}, 0)
    with pytest.raises(UserError, match="got the sources notes, other"):
        Budget(["8:1k"], "even", {"notes": 1.0, "other": 2.0}, 0)
    with pytest.raises(UserError, match="NUMBER"):
        Budget(["8:1x"], "even", {"book": 1.0}, 0)
