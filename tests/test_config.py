"""Options: the seed's flags, the YAML file, and the one message for all that is wrong."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from llama_lib.config import (
    SCRIPTS,
    Options,
    dump_yaml,
    help_text,
    options_table,
    parse_options,
)
from llama_lib.errors import UserError
from llama_lib.option_tree import SECTIONS
from llama_lib.options import declared

ROOT = Path(__file__).parents[1]


def problems(argv: list[str], script: str = "pretrain") -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_options(script, argv)
    return caught.value.problems


def flat(options: Options) -> dict[str, object]:
    return {name: v for section in options.to_dict().values() for name, v in section.items()}


# The flags of the original recipe: short form, long form, a value, what it becomes, the default.
SEED_FLAGS = [
    ("-c", "config", "13b", "13b", "7b"),
    ("-p", "plugin", "zero2", "zero2", "gemini"),
    ("-d", "dataset", "a", ["a"], ["togethercomputer/RedPajama-Data-1T-Sample"]),
    ("-e", "num_epochs", "3", 3, 1),
    ("-b", "batch_size", "16", 16, 2),
    (None, "lr", "1.5e-4", 1.5e-4, 3e-4),
    ("-w", "weight_decay", "0.01", 0.01, 0.1),
    ("-s", "warmup_steps", "10", 10, 2000),
    ("-g", "gradient_checkpoint", None, True, False),
    ("-l", "max_length", "2048", 2048, 4096),
    ("-x", "mixed_precision", "bf16", "bf16", "fp16"),
    ("-i", "save_interval", "5", 5, 1000),
    ("-o", "save_dir", "out", "out", "checkpoint"),
    ("-f", "load", "auto", "auto", None),
    (None, "gradient_clipping", "0.5", 0.5, 1.0),
    ("-t", "tensorboard_dir", "tb", "tb", "tb_logs"),
    ("-a", "flash_attention", None, True, False),
    (None, "model_path", "/path/llama", "/path/llama", None),
]


@pytest.mark.parametrize(("short", "name", "text", "value", "default"), SEED_FLAGS)
def test_seed_flag(short, name, text, value, default):
    assert flat(parse_options("pretrain", []))[name] == default
    for flag in [f"--{name}"] + ([short] if short else []):
        options = parse_options("pretrain", [flag] if text is None else [flag, text])
        assert flat(options)[name] == value
        assert options.typed == {name}


def test_finetune_has_its_own_defaults_and_fields():
    options = parse_options("finetune", [])
    assert options.data.dataset == ["yizhongw/self_instruct"]
    assert options.data.task_name == "super_natural_instructions"
    assert "task_name" in options.to_dict()["data"]
    assert "task_name" not in parse_options("pretrain", []).to_dict()["data"]
    assert "unknown flag --task_name" in problems(["--task_name", "x"])[0]


def test_names_are_unique_and_explained():
    fields = [item for tree in SECTIONS.values() for item in tree.__dataclass_fields__.values()]
    assert len({item.name for item in fields}) == len(fields)
    assert all(item.metadata["meaning"] for item in fields)
    for script in SCRIPTS:
        options = declared(SECTIONS, script)
        shorts = [item.short for item in options.values() if item.short]
        assert len(set(shorts)) == len(shorts)
        for item in options.values():
            # Every default is a value that can also be typed.
            if item.default is not None and not item.many:
                assert item.reader.read(str(item.default)) == item.initial


def test_bare_options_equal_the_defaults():
    assert Options() == parse_options("pretrain", [])
    assert not Options().data.cache_dir.startswith("~")


def test_switches_turn_on_and_off(tmp_path):
    assert parse_options("pretrain", ["-ga"]).model.flash_attention
    file = tmp_path / "specs.yaml"
    file.write_text("gradient_checkpoint: true\nflash_attention: no\n")
    options = parse_options("pretrain", ["--spec_file", str(file)])
    assert options.model.gradient_checkpoint and not options.model.flash_attention
    argv = ["--spec_file", str(file), "--no-gradient_checkpoint"]
    assert not parse_options("pretrain", argv).model.gradient_checkpoint


def test_dataset_takes_one_or_more_values(tmp_path):
    argv = ["-d", "a", "b", "--eval_data", "c", "d", "-b", "4"]
    assert parse_options("pretrain", argv).data.dataset == ["a", "b"]
    assert parse_options("pretrain", argv).data.eval_data == ["c", "d"]
    file = tmp_path / "specs.yaml"
    file.write_text("dataset: [a, b]\neval_data: c\n")
    data = parse_options("pretrain", ["--spec_file", str(file)]).data
    assert (data.dataset, data.eval_data) == (["a", "b"], ["c"])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("4096", 4096),
        ("100k", 100_000),
        ("4m", 4_000_000),
        ("1.8b", 1_800_000_000),
        ("1.8B", 1_800_000_000),
        ("1.4t", 1_400_000_000_000),
    ],
)
def test_token_counts(text, tokens):
    argv = ["--max_tokens", text, "--global_batch_tokens", text]
    training = parse_options("pretrain", argv).training
    assert training.max_tokens == training.global_batch_tokens == tokens


def test_flag_beats_file_beats_default(tmp_path):
    file = tmp_path / "specs.yaml"
    # YAML 1.1 itself would make a string of 3e-4 and the number 308 of 5:8.
    file.write_text("lr: 3e-5\nbatch_size: 8\nprofile: 5:8\nmax_tokens: 200m\nmax_steps: 7\n")
    argv = ["--spec_file", str(file), "-b", "4", "--max_steps", "none"]
    options = parse_options("pretrain", argv)
    assert options.training.lr == 3e-5
    assert options.training.batch_size == 4
    assert options.training.max_tokens == 200_000_000
    assert options.training.max_steps is None
    assert options.report.profile == "5:8"
    assert options.training.weight_decay == 0.1
    assert options.typed == {"lr", "batch_size", "profile", "max_tokens", "max_steps"}


def test_dumped_options_reload(tmp_path):
    argv = ["-d", "a b", "c", "-g", "--max_tokens", "1b", "--profile", "5:8", "--lr", "1e-9"]
    options = parse_options("pretrain", [*argv, "--zero_stage", "1", "--load", "x: y"])
    file = tmp_path / "specs.yaml"
    dump_yaml(options, file)
    assert parse_options("pretrain", ["--spec_file", str(file)]) == options
    assert yaml.safe_load(file.read_text()) == options.to_dict()


def test_a_saved_derived_accumulation_reloads(tmp_path):
    options = parse_options("pretrain", ["--global_batch_tokens", "4m"])
    options.training.accumulation_steps = 8
    dump_yaml(options, tmp_path / "specs.yaml")
    argv = ["--spec_file", str(tmp_path / "specs.yaml")]
    assert parse_options("pretrain", argv) == options
    assert "--global_batch_tokens none" in problems([*argv, "--accumulation_steps", "2"])[0]


def test_everything_wrong_is_said_at_once(tmp_path):
    file = tmp_path / "specs.yaml"
    file.write_text("bacth_size: 3\nmodel: {lr: 1}\nworkers: -1\n")
    argv = ["-p", "gemin", "-x", "fp8", "--sp_mode", "split_gathr", "-b", "0", "--lr", "fast"]
    argv += ["--eval_ratio", "1", "--offload_optim_frac", "1.5", "--profile", "8:5", "-d", "-e"]
    argv += ["--max_tokens", "1.5", "--seed", "-1", "--weigth_decy", "1", "--spec_file", str(file)]
    found = problems(argv)
    expected = [
        ("--plugin", "'gemin'", "gemini_auto", "did you mean gemini?"),
        ("--mixed_precision", "'fp8'", "fp16, bf16, fp32"),
        ("--sp_mode", "did you mean split_gather?"),
        ("--batch_size", "'0'", "at least 1"),
        ("--lr", "'fast'", "a number above 0"),
        ("--eval_ratio", "'1'", "below 1"),
        ("--offload_optim_frac", "'1.5'", "0 to 1"),
        ("--profile", "'8:5'", "START:STOP"),
        ("--dataset", "no value"),
        ("--num_epochs", "no value"),
        ("--max_tokens", "'1.5'", "100k"),
        ("--seed", "'-1'", "at least 0"),
        ("unknown flag --weigth_decy", "did you mean --weight_decay?"),
        ("unknown key 'bacth_size'", "did you mean batch_size?"),
        ("lr", "'model'", "'training'"),
        ("workers", "'-1'", "at least 0"),
    ]
    for parts in expected:
        assert any(all(part in line for part in parts) for line in found), parts
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_step", "3"], "did you mean --max_steps?"),
        (["--batch-size", "3"], "did you mean --batch_size?"),
        (["-lr", "3e-4"], "did you mean --lr?"),
        (["--frobnicate"], "unknown flag --frobnicate; see python pretrain.py --help"),
        (["7b"], "unexpected argument: got '7b'"),
        (["-g", "true"], "write --NAME or --no-NAME"),
        (["--gradient_checkpoint=true"], "gradient_checkpoint"),
        (["--lr", "nan"], "expected a number above 0"),
        (["--plugin", "none"], "expected one of gemini"),
        (["--spec_file"], "--spec_file: got no value"),
        (["--spec_file", "missing.yaml"], "No such file"),
        (["--accumulation_steps", "2", "--global_batch_tokens", "4m"], "expected one"),
        (["-g", "--recompute", "none"], "got --recompute none too"),
        (["-g", "--recompute", "selective"], "got --recompute selective too"),
    ],
)
def test_one_mistake_one_message(argv, message):
    found = problems(argv)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: 1\nlr: 2\n", "lr is given twice (line 2)"),
        ("lr: 1\ntraining: {lr: 2}\n", "lr is given twice"),
        ("- lr\n", "expected lines of the form 'key: value'"),
        ("lr: [", "is not a YAML file of options"),
        ("lr: [1, 2]\n", "expected a number above 0"),
        ("lr: {a: 1}\n", "expected a number above 0"),
        ("lr:\n", "got no value"),
        ("modle: {config: 7b}\n", "unknown key 'modle'; did you mean model?"),
        ("config: 7b\n? [a]\n: b\n", "unknown key"),
    ],
)
def test_bad_file(tmp_path, content, message):
    (tmp_path / "specs.yaml").write_text(content)
    found = problems(["--spec_file", str(tmp_path / "specs.yaml")])
    assert len(found) == 1
    assert message in found[0]


def test_empty_file_and_empty_section_are_fine(tmp_path):
    for content in ("", "# nothing\n", "model:\ntraining: {}\n"):
        (tmp_path / "specs.yaml").write_text(content)
        argv = ["--spec_file", str(tmp_path / "specs.yaml")]
        assert parse_options("pretrain", argv) == Options()


def test_upstream_spellings_work_with_one_line_each(capsys):
    argv = ["--grad_checkpoint", "--grad_clip", "0.5", "--weigth_decay", "0.2"]
    options = parse_options("pretrain", argv)
    assert options.model.gradient_checkpoint
    assert options.training.gradient_clipping == 0.5
    assert options.training.weight_decay == 0.2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "--weigth_decay is deprecated: write --weight_decay" in lines


def test_upstream_spelling_beside_the_new_one_is_refused():
    assert "got both" in problems(["--grad_clip", "0.5", "--gradient_clipping", "1"])[0]


def test_only_the_first_process_warns(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    parse_options("pretrain", ["--grad_checkpoint"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_help_and_table_show_every_option(script, capsys):
    with pytest.raises(SystemExit) as end:
        parse_options(script, ["--lr", "bad", "--help"])
    assert not end.value.code
    page = capsys.readouterr().out
    assert page.rstrip("\n") == help_text(script)
    assert max(len(line) for line in page.splitlines()) <= 100
    table = options_table(script)
    for name, item in declared(SECTIONS, script).items():
        assert f"--{name}" in page
        assert f"`--{name}` |" in table
        assert item.meaning in table
    assert "| `-x`, `--mixed_precision` | `fp16` |" in table


def test_parsing_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from llama_lib.config import parse_options; import llama_lib.models;"
        "import llama_lib.flops, llama_lib.metrics, llama_lib.versions;"
        "parse_options('pretrain', []);"
        "print([m for m in ('torch', 'transformers', 'numpy', 'colossalai') if m in sys.modules])"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert time.monotonic() - start < 2


def test_shares_may_be_written_as_a_mapping(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text("data:\n  dataset: {a.jsonl: 0.7, 'b[500]': 0.3}\n")
    options = parse_options("pretrain", ["--spec_file", str(path)])
    assert options.data.dataset == ["a.jsonl:0.7", "b[500]:0.3"]
    path.write_text("dataset: {a.jsonl: {b: 0.3}}\n")
    assert "dataset" in problems(["--spec_file", str(path)])[0]
