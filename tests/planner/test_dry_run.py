"""`--dry_run`: what it shows and refuses, without torch, data and weights."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_lib.cli import run_command
from llama_lib.config import parse_options
from llama_lib.dry_run import LAST_LINE, dry_run
from llama_lib.errors import UserError
from llama_lib.models import model_shape
from llama_lib.option_checks import LINEAR_LAYERS
from llama_lib.planner.hardware import HostGpu
from llama_lib.planner.job import job_of
from llama_lib.planner.memory import memory

ROOT = Path(__file__).parents[2]

# Processor time of a whole dry run: the promise is 2 seconds on an idle machine.
CPU_SECONDS = 2.0

TINY = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a model that has no weights, and conversations."""
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("llama_lib.dry_run.host_gpu", lambda: None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "chats.jsonl").write_text("never read\n")
    return tmp_path


@pytest.fixture
def show(folder, capsys):
    """Runs a dry run; (exit code, what it printed, what it complained)."""

    def run(script: str, flags: str):
        options = parse_options(script, ["--dry_run", *flags.split()])
        code = run_command(lambda _: dry_run(options), [])
        out, err = capsys.readouterr()
        return code, out, err

    return run


FINETUNE = "--model_path model -d chats.jsonl -p zero2"


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("pretrain", "-c 7b -x bf16"),
        ("pretrain", "-c tiny -d sample -p hybrid_parallel --tp 2 --pp 2 -b 4"),
        ("finetune", FINETUNE),
        ("finetune", f"{FINETUNE} --lora_rank 8"),
        ("benchmark", "-c 7b -p gemini -g -b 16"),
    ],
)
def test_it_answers_in_two_seconds_without_torch(folder, script, flags):
    program = (
        "import json, resource, sys\n"
        "from llama_lib.entry import main\n"
        "code = main(sys.argv[1], sys.argv[2:])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "heavy = [m for m in ('torch', 'transformers', 'colossalai') if m in sys.modules]\n"
        "print(json.dumps([code, used.ru_utime + used.ru_stime, heavy]))\n"
    )
    world = "4" if "--tp" in flags else "1"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": world}
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", program, script, *flags.split(), "--dry_run"],
        capture_output=True,
        text=True,
        env=environment,
    )
    wall = time.perf_counter() - start
    assert run.returncode == 0, run.stderr
    *shown, last = run.stdout.splitlines()
    code, cpu, heavy = json.loads(last)
    assert heavy == []
    assert shown[-1] == LAST_LINE
    # Wall time also measures what else runs on the machine: bounded by ten times the promise.
    assert cpu < CPU_SECONDS and wall < 10 * CPU_SECONDS, (cpu, wall)
    # A GPU of this machine may be too small for the model; without one there is no verdict.
    assert code == 0 or shutil.which("nvidia-smi")


def test_the_numbers_are_those_of_the_run(show):
    flags = "-c 1.1b -d sample -p zero2 -b 3 -g --accumulation_steps 2"
    code, out, _ = show("pretrain", flags)
    assert code == 0
    options = parse_options("pretrain", [*flags.split(), "-x", "bf16"])
    need = memory(job_of(options, model_shape("1.1b"), 1, 1))
    for kind, size in need.device.items():
        if size:
            assert re.search(rf"^{kind} +{size / 2**20:,.0f} MB", out, re.MULTILINE), kind
    assert "batch_size 3 x dp 1 x accumulation 2 = 6 rows x 2048 = 12,288 tokens per step" in out
    assert "--max_length is 2048, the model's context (default 4096)" in out
    assert "--mixed_precision is bf16" in out
    assert "n/a (no times for a CPU)" in out and "--peak_tflops" not in out
    assert out.splitlines()[-1] == LAST_LINE


def test_adapters_need_less_than_the_whole_model(show):
    def peak(flags: str) -> float:
        _, out, _ = show("finetune", f"{FINETUNE} {flags}")
        return float(re.search(r"^peak +([\d,]+) MB", out, re.MULTILINE)[1].replace(",", ""))

    assert peak("--lora_rank 4") < peak("")
    _, out, _ = show("finetune", f"{FINETUNE} --lora_rank 4")
    # q, k, v, o, gate, up and down: six of 256 inputs, one of 688
    outputs = 256 + 128 + 128 + 256 + 688 + 688 + 256
    trained = 4 * 4 * (256 * 6 + 688 + outputs)
    assert f"adapters of rank 4: {trained:,} trained" in out


def test_a_checkpoint_to_resume_gives_the_shape(show, folder):
    from llama_lib.checkpoint.manifest import FileRecord, Manifest

    checkpoint = folder / "checkpoint" / "step-00000003"
    (checkpoint / "model").mkdir(parents=True)
    text = json.dumps(TINY | {"num_hidden_layers": 2})
    (checkpoint / "model" / "config.json").write_text(text)
    record = FileRecord(len(text), "0" * 64)
    Manifest(3, "zero2", {}, {}, {"model/config.json": record}).write(checkpoint)
    for load in ("auto", "checkpoint/step-00000003"):
        code, out, err = show("finetune", f"-d chats.jsonl -p zero2 --load {load}")
        assert code == 0, err
        assert "1,839,360 parameters" not in out
        layers = re.search(r"model \S+: ([\d,]+) parameters", out)[1]
        whole = re.search(r": ([\d,]+) parameters", show("finetune", FINETUNE)[1])[1]
        assert int(layers.replace(",", "")) < int(whole.replace(",", ""))
    # Without --load the run would be refused; a dry run writes nothing and says so.
    code, out, _ = show("finetune", FINETUNE)
    assert code == 0 and "without --dry_run this is refused: --save_dir checkpoint" in out


def test_all_problems_are_named_at_once(show):
    code, out, err = show(
        "pretrain",
        "-c 7b -d nowhere.jsonl -p hybrid_parallel --tp 3 --sp_mode ring -l 9000 -a "
        "--load nothing --seed 4294967296",
    )
    assert code == 2 and out == ""
    for part in (
        "--tp 3 does not divide",
        "--sp_mode ring is refused",
        "more than the model's context of 4096",
        "which needs a GPU",
        "nowhere.jsonl",
        "--load nothing: no such directory",
        "--seed 4294967296",
    ):
        assert part in err, part


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("finetune", "-d chats.jsonl", "give --model_path FOLDER"),
        ("finetune", "--model_path nowhere/at/all -d chats.jsonl", "no such folder"),
        ("finetune", f"{FINETUNE} -d gone.jsonl", "gone.jsonl"),
        ("finetune", "--model_path model -d chats.jsonl -p gemini --lora_rank 8", "no adapters"),
        ("finetune", f"{FINETUNE} --lora_rank 8 --lora_targets w1", "--lora_targets w1"),
        ("finetune", f"{FINETUNE} --merge_lora", "no adapters to merge"),
        ("finetune", f"{FINETUNE} --min_length 600 -l 512", "no conversation would be left"),
        ("finetune", "-d chats.jsonl --load auto", "--load auto: there is no"),
        ("pretrain", "-c 9b -d sample", "no model '9b'"),
        ("pretrain", "-c tiny -d sample --global_batch_tokens 1000", "is not a multiple"),
        ("benchmark", "-c tiny -d random other", "random rows cannot be mixed"),
    ],
)
def test_what_would_be_refused_is_refused(show, script, flags, message):
    code, _, err = show(script, flags)
    assert code == 2 and message in err, err


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("pretrain", "-c tiny -d sample -p zero2 --tp 2 --zero_stage 1"),
        ("pretrain", "-c tiny -d sample -a -p hybrid_parallel --pp 9 --microbatch_size 3"),
        ("pretrain", "-c mistral-7b -d sample -p zero2 --microbatch_size 2 -l 99999"),
        ("finetune", f"{FINETUNE} -x bf16 --lora_rank 4 --lora_targets nope q_proj --sp 2"),
        ("finetune", "--model_path model -d chats.jsonl -p gemini --lora_rank 4 --min_length 900"),
        ("finetune", f"{FINETUNE} --merge_lora --sample_interval 5 -l 600"),
        ("pretrain", "-c tiny -d sample -p gemini --compile --kernels liger --recompute selective"),
        ("finetune", f"{FINETUNE} -x bf16 --compile --lora_rank 4"),
    ],
)
def test_it_says_what_the_start_of_the_run_says(folder, script, flags):
    from llama_lib.preflight import preflight

    words = [*flags.split(), "-o", "elsewhere"]
    found = []
    for check in (dry_run, preflight):
        with pytest.raises(UserError) as error:
            check(parse_options(script, words))
        found.append(set(error.value.problems))
    # The run has read more by then: the data may be found wrong too.
    assert found[0] and found[0] <= found[1]


def test_the_linear_layers_of_a_block_are_those_of_transformers():
    import torch
    from transformers import AutoModelForCausalLM

    from llama_lib.models import model_config

    for name in ("tiny", "mistral-7b"):
        config = model_config(name)
        config.num_hidden_layers = 1
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = [
            path.rpartition(".")[2]
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".layers." in path
        ]
        assert tuple(layers) == LINEAR_LAYERS


def test_one_process_speaks(show, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert show("pretrain", "-c tiny -d sample") == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    assert "2 process(es) = dp 2" in show("pretrain", "-c tiny -d sample")[1]


def test_a_gpu_of_this_machine_gives_a_verdict_and_times(show, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("llama_lib.dry_run.host_gpu", lambda: HostGpu("NVIDIA H200", 143771, 2))
    monkeypatch.setattr("llama_lib.dry_run.host_memory", lambda: 2**40)
    code, out, _ = show("pretrain", "-c 7b -d sample -x bf16 -p gemini -b 2 -g")
    assert code == 0 and "2 x NVIDIA H200, 143,771 MB each" in out
    assert "fits; the largest batch that fits is -b" in out
    assert re.search(r"predicted step of 16,384 tokens: [\d.]+ s", out)
    code, out, _ = show("pretrain", "-c 30b -d sample -x bf16 -p zero2")
    assert code == 1 and "does not fit" in out and "  1) " in out
    unheard = HostGpu("NVIDIA Unheard", 143771, 2)
    monkeypatch.setattr("llama_lib.dry_run.host_gpu", lambda: unheard)
    _, out, _ = show("pretrain", "-c 7b -d sample -x bf16")
    assert "n/a (speed of 'NVIDIA Unheard'" in out and "--peak_tflops" in out
    _, out, _ = show("pretrain", "-c 7b -d sample -x bf16 --peak_tflops 500")
    assert "predicted rate" in out and "left out of the time" in out


def test_offloading_that_is_not_needed_is_said(show, monkeypatch):
    monkeypatch.setattr("llama_lib.dry_run.host_gpu", lambda: HostGpu("NVIDIA H200", 143771, 1))
    monkeypatch.setattr("llama_lib.dry_run.host_memory", lambda: 2**40)
    base = "-c 1.1b -d sample -x bf16 -b 1"
    for flags, instead in (
        ("-p zero2_cpu", "-p zero2"),
        ("-p gemini_auto", "-p gemini"),
        ("-p gemini --offload_optim_frac 1.0", "--offload_optim_frac 0"),
    ):
        _, out, _ = show("pretrain", f"{base} {flags}")
        (line,) = [line for line in out.splitlines() if "offloading is not needed" in line]
        assert f"{instead} fits" in line and "MB to spare" in line and "-" in line.split("step")[1]
    _, out, _ = show("pretrain", "-c 13b -d sample -x bf16 -b 1 -g -p zero2_cpu")
    assert "offloading is not needed" not in out


def test_other_plugins_are_shown_whatever_the_run_asks_of_its_own(show, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("llama_lib.dry_run.host_gpu", lambda: HostGpu("NVIDIA H200", 143771, 4))
    monkeypatch.setattr("llama_lib.dry_run.host_memory", lambda: 2**41)
    base = "-c 7b -d sample -x bf16 -b 4"
    for flags in (
        "-p hybrid_parallel --tp 2 --zero_stage 1",
        "-p hybrid_parallel --pp 2 --microbatch_size 2",
        "-p gemini --offload_optim_frac 1.0 --offload_param_frac 1.0",
    ):
        _, out, _ = show("pretrain", f"{base} {flags}")
        layouts = out[out.index("layouts that fit") :]
        for plugin in ("zero2", "gemini", "hybrid_parallel"):
            assert re.search(rf"^ *\d+  {plugin} ", layouts, re.MULTILINE), (flags, plugin)


def test_a_precision_without_times_is_named(show, monkeypatch):
    monkeypatch.setattr("llama_lib.dry_run.host_gpu", lambda: HostGpu("NVIDIA H200", 143771, 1))
    monkeypatch.setattr("llama_lib.dry_run.host_memory", lambda: 2**40)
    _, out, _ = show("pretrain", "-c 1.1b -d sample -x fp32 -p zero2 -b 1")
    assert "times are predicted for 16 bits only" in out and "--peak_tflops" not in out


def test_a_run_shorter_than_its_warm_up_is_warned_of(show):
    flags = "-c tiny -d sample -p zero2 -b 2"
    _, out, _ = show("pretrain", f"{flags} --max_steps 10")
    assert "10 steps of 1,024 tokens are fewer than the 2,000 of warm-up" in out
    assert "of warm-up" not in show("pretrain", f"{flags} --max_steps 10 -s 5")[1]
    assert "of warm-up" not in show("pretrain", flags)[1]


def test_data_sets_of_the_hub_are_not_touched(show, monkeypatch):
    monkeypatch.setattr("llama_lib.data.sources.hub_files", lambda *_: pytest.fail("asked"))
    assert show("pretrain", "-c tiny")[0] == 0  # the default is a data set of the hub
    assert show("pretrain", "-c tiny -d owner/name other/thing:part")[0] == 0


def test_options_are_left_as_they_are(folder, capsys):
    words = f"{FINETUNE} --dry_run".split()
    options = parse_options("finetune", words)
    dry_run(options)
    assert options == parse_options("finetune", words)
    assert sorted(path.name for path in folder.iterdir()) == ["chats.jsonl", "model"]
