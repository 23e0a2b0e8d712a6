"""`make pretrain`: what the run of specs/demo.yaml leaves behind, held against the promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llama_lib.checkpoint.manifest import step_directories
from llama_lib.checkpoint.verify import checkpoint_problems
from llama_lib.data.prepared import PreparedDataset, unigram_entropy

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "specs" / "demo.yaml"


def check(save_dir: Path, tensorboard_dir: Path, cache_dir: Path) -> tuple[float, float]:
    """(held-out loss, unigram entropy of the held-out text) of a finished demo."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    last = [json.loads(line) for line in (tensorboard_dir / "eval.jsonl").open()][-1]
    assert last["step"] == yaml.safe_load(SPEC.read_text())["max_steps"]
    (prepared,) = (cache_dir / "prepared").iterdir()
    held_out = PreparedDataset.open(prepared).held_out
    assert held_out is not None
    loss, entropy = last["losses"]["all"], unigram_entropy(held_out)
    assert loss <= entropy - 1
    newest = step_directories(save_dir)[0]
    assert checkpoint_problems(newest) == []
    model = AutoModelForCausalLM.from_pretrained(newest / "model")
    tokenizer = AutoTokenizer.from_pretrained(newest / "model")
    inputs = tokenizer("The with statement", return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    words = tokenizer.decode(output[0]).split()
    # Greedy text of so small a model repeats itself, but in words of its corpus.
    vocabulary = {w for i in range(5) for w in tokenizer.decode(held_out.tokens(i)).split()}
    assert len([word for word in words if word in vocabulary]) >= len(words) / 2
    return loss, entropy


@pytest.mark.full
def test_make_pretrain_learns_and_leaves_a_model(tmp_path):
    folders = {"-o": "checkpoint", "-t": "tb", "--cache_dir": "cache"}
    command = [sys.executable, "pretrain.py", "--spec_file", str(SPEC)]
    for flag, name in folders.items():
        command += [flag, str(tmp_path / name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("max memory usage:  ")
    check(*(tmp_path / name for name in folders.values()))
