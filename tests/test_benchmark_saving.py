"""What benchmarks/saving.py reads out of a run's log and clock."""

import pytest

from benchmarks import saving

LOG = """\
2026-01-01 00:00:00,000 INFO step 1 batch abc
2026-01-01 00:00:04,500 INFO save of step 4: 0.5000 s
2026-01-01 00:00:07,000 INFO saved /x/step-00000004 beside the training in 2.0 s; the loop waited
2026-01-01 00:00:08,750 INFO save of step 8: 0.2500 s
2026-01-01 00:00:09,000 INFO saved /x/step-00000008 beside the training in 0.1 s; the loop waited
2026-01-01 00:00:10,000 INFO save of step 9: 3.0000 s
"""


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    (tmp_path / "log").write_text(LOG)
    begin = saving.datetime.fromisoformat("2026-01-01 00:00:00").timestamp()
    # A step a second, two while something is written; the clock stands still for no save.
    clock = [begin + each for each in (1, 2, 3, 4, 5.5, 6.5, 7.5, 8.5, 9.75)]
    monkeypatch.setattr(saving, "moments", lambda folder: clock)
    arguments = saving.arguments_of(["--interval", "4", "--saves", "2", "--ignore", "1"])
    arguments.steps = 9
    return arguments


def test_a_save_is_in_no_step_and_the_last_one_in_no_number(arguments, tmp_path):
    found = saving.saves_and_steps(tmp_path, tmp_path / "log", arguments)
    assert found["stopped_seconds"] == [0.5, 0.25]
    assert found["writing_seconds"] == [2.0, 0.1]
    # Written from 4.5 to 6.5 and from 8.75 to 8.85.
    assert found["step_seconds_while_writing"] == [1.0, 1.0, 1.0]
    assert found["step_seconds_otherwise"] == [1.0] * 5
    arguments.saves = 3
    with pytest.raises(SystemExit, match="2 saves, expected 3"):
        saving.saves_and_steps(tmp_path, tmp_path / "log", arguments)


def test_the_summary_compares_the_two_ways():
    at_once = {"contender": "zero2", "way": "at once", "stopped_seconds": [4.0, 2.0]}
    beside = at_once | {"way": "beside", "stopped_seconds": [0.4, 0.2], "checkpoint_mb": 7.0}
    beside |= {"writing_seconds": [3.0]}
    beside |= {"step_seconds_while_writing": [1.5], "step_seconds_otherwise": [1.0]}
    found = saving.summary([at_once, beside])["zero2"]
    assert (found["share"], found["slowdown"]) == (0.1, 1.5)
    assert found["stopped_beside_later_s"] == 0.2


@pytest.mark.parametrize("flags", ["--only trainer", "--only zero2-3", "--interval 3"])
def test_what_makes_no_sense_is_refused(flags):
    with pytest.raises(SystemExit):
        saving.arguments_of(flags.split())
