"""Every plugin trains on CPU processes through the real Booster, and as a plain loop does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("host_smoke.py")
TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict, str]:
    """Losses by precision and plugin of one start of two processes, and what it printed."""
    report = tmp_path_factory.mktemp("host") / "report.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    outcome = subprocess.run(
        [*launcher, str(SCRIPT), str(report)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(report.read_text()), outcome.stdout + outcome.stderr


@pytest.mark.parametrize("precision", TOLERANCES)
def test_losses_equal_a_plain_loop(run, precision):
    losses = dict(run[0][precision])
    plain = losses.pop("plain")
    for plugin, found in losses.items():
        assert found == pytest.approx(plain, rel=TOLERANCES[precision]), plugin


@pytest.mark.parametrize("precision", TOLERANCES)
def test_losses_fall(run, precision):
    for plugin, losses in run[0][precision].items():
        assert losses[-1] < losses[0] - 0.2, plugin


@pytest.mark.parametrize("precision", TOLERANCES)
def test_gemini_tiers_change_nothing(run, precision):
    """Where chunks lie is not arithmetic: offloaded or not, one loss to the last bit."""
    losses = run[0][precision]
    for plugin in ("gemini_offload_optim", "gemini_offload_all", "gemini_auto"):
        assert losses[plugin] == losses["gemini"], plugin


def test_the_engine_prints_no_warnings(run):
    assert "Warning" not in run[1]
    assert "finish_collection" not in run[1]
