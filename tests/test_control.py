"""Signals and request files, in one real process with a gloo group of its own."""

import os
import signal
import time

import pytest
import torch.distributed as dist

from llama_lib import control
from llama_lib.control import Requests

SOON = 0.2


@pytest.fixture
def requests(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "ANSWER_SECONDS", SOON)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    requests = Requests(str(tmp_path))
    yield requests
    requests.close()
    dist.destroy_process_group()


@pytest.fixture
def ended(monkeypatch):
    """Exit codes the process would have ended with."""
    codes: list[int] = []
    monkeypatch.setattr(control.os, "_exit", codes.append)
    return codes


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # the thread that reads the wake-up descriptor


def test_nothing_asked_nothing_done(requests):
    requests.ask()
    request = requests.answer()
    assert (request.save, request.leave, request.signal_number) == (False, False, 0)


def test_files_ask_once(requests, tmp_path):
    (tmp_path / "save_now").touch()
    requests.ask()
    assert requests.answer() == control.Request(save=True)
    requests.ask()
    assert requests.answer() == control.Request()
    (tmp_path / "save_and_exit").touch()
    requests.ask()
    assert requests.answer() == control.Request(save=True, leave=True)
    assert list(tmp_path.iterdir()) == []


def test_what_failed_on_one_rank_is_known_to_all(requests):
    requests.ask(failed=True)
    assert requests.answer() == control.Request(failed=True)
    requests.ask()
    assert requests.answer() == control.Request()


def test_a_single_process_takes_its_time(requests, ended):
    requests.ask()
    send(signal.SIGTERM)
    time.sleep(2 * SOON)
    requests.answer()
    requests.ask()
    assert requests.answer() == control.Request(True, True, signal.SIGTERM)
    assert ended == []


def test_a_rank_that_others_wait_for_in_vain_ends(requests, ended, monkeypatch, capsys):
    monkeypatch.setattr(control.dist, "get_world_size", lambda *_: 2)
    requests.ask()
    send(signal.SIGTERM)
    time.sleep(2 * SOON)
    assert ended == [1]
    assert "save_and_exit" in capsys.readouterr().err


def test_the_deadline_rests_while_saving(requests, ended, monkeypatch):
    monkeypatch.setattr(control.dist, "get_world_size", lambda *_: 2)
    requests.ask()
    requests.answer()
    send(signal.SIGTERM)
    time.sleep(2 * SOON)
    assert ended == []
    requests.ask()
    assert requests.answer().signal_number == signal.SIGTERM


def test_the_second_ctrl_c_ends_at_once(requests, ended, monkeypatch):
    monkeypatch.setattr(control, "ECHO_SECONDS", 0.1)
    send(signal.SIGINT)
    send(signal.SIGINT)  # the launcher passing the first one on
    assert ended == []
    time.sleep(0.2)
    send(signal.SIGINT)
    assert ended == [130]
