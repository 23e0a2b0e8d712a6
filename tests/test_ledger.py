"""From a step back to its rows: over resumptions, skipped ranges and damage."""

import json
from pathlib import Path

import pytest

from llama_lib.data.position import Position
from llama_lib.errors import RunError, UserError
from llama_lib.ledger import (
    FILE,
    LedgerWriter,
    Part,
    consumption,
    read_step,
    tokens_by_source,
)


def write(folder: Path, part: Part, **streams: dict) -> None:
    writer = LedgerWriter(str(folder), part, is_writer=True)
    for step, state in streams.items():
        writer.stream_step(int(step.removeprefix("s")), state)
    writer.close()


def part(step: int, sample: int, batch: int, **more) -> Part:
    return Part(step, 100, batch, "hash", Position(step - 1, sample, **more))


def test_steps_of_every_part_of_a_run(tmp_path):
    write(tmp_path, part(1, 0, 8))
    write(tmp_path, part(5, 32, 6))  # resumed after step 4 with another batch size
    assert read_step(tmp_path, 1).samples == list(range(8))
    assert read_step(tmp_path, 4).samples == list(range(24, 32))
    assert read_step(tmp_path, 5).samples == list(range(32, 38))
    assert read_step(tmp_path, 7).samples == list(range(44, 50))


def test_a_resumed_run_cuts_what_it_does_again(tmp_path):
    write(tmp_path, part(1, 0, 4), s1={"token": 0}, s2={"token": 64}, s3={"token": 128})
    write(tmp_path, part(3, 8, 4), s3={"token": 999})
    assert [read_step(tmp_path, step).stream for step in (1, 2, 3)] == [
        {"token": 0},
        {"token": 64},
        {"token": 999},
    ]
    assert read_step(tmp_path, 4).stream == {}  # not reached


def test_skipped_ranges_are_left_out(tmp_path):
    place = Position().skipping(3, 5, 4)  # steps 3 and 4 of 4 rows
    write(tmp_path, Part(1, 100, 4, "hash", place))
    assert read_step(tmp_path, 2).samples == [4, 5, 6, 7]
    assert read_step(tmp_path, 3).samples == [16, 17, 18, 19]


def test_a_fresh_run_moves_the_ledger_of_another_aside(tmp_path):
    write(tmp_path, part(1, 0, 8))
    write(tmp_path, part(1, 0, 4))
    assert len(read_step(tmp_path, 1).samples) == 4
    assert (tmp_path / "ledger.1.jsonl").is_file()


@pytest.mark.parametrize("step", [0, 101])
def test_a_step_that_is_not_of_the_run(tmp_path, step):
    write(tmp_path, part(1, 0, 8))
    with pytest.raises(UserError, match=f"--step {step}: the run in .* has"):
        read_step(tmp_path, step)


def test_no_ledger(tmp_path):
    with pytest.raises(UserError, match=r"holds no ledger\.jsonl"):
        read_step(tmp_path, 1)


def test_damage_is_named_but_half_a_last_line_is_none(tmp_path):
    write(tmp_path, part(1, 0, 8), s1={"token": 0})
    path = tmp_path / FILE
    good = path.read_text()
    path.write_text(good + '{"step": 2, "str')
    assert read_step(tmp_path, 1).stream == {"token": 0}
    path.write_text("{broken\n" + good)
    with pytest.raises(RunError, match="line 1 is damaged"):
        read_step(tmp_path, 1)


def test_only_one_process_writes(tmp_path):
    LedgerWriter(str(tmp_path), part(1, 0, 8), is_writer=False).close()
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_one_line_whatever_its_length(tmp_path):
    write(tmp_path, part(1, 0, 8))
    (line,) = (tmp_path / FILE).read_text().splitlines()
    assert json.loads(line)["part"]["global_batch"] == 8


def test_tokens_are_counted_once_for_each_replica():
    counted = [(0, {"a": 10}), (0, {"a": 10}), (1, {"a": 5, "b": 1})]  # two ranks of replica 0
    assert tokens_by_source(counted, {"b": 100}) == {"a": 15, "b": 101}


def test_consumption_shows_share_and_passes():
    lines = consumption({"code": 300, "web": 700}, {"code": 100})
    assert "web" in lines[0] and "70.00%" in lines[0] and "passes" not in lines[0]
    assert "30.00%" in lines[1] and "3 passes" in lines[1]
