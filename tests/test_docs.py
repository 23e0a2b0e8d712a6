"""The pages say what the program does: every command is parsed, every link and table is checked.

`python -m tests.test_docs` writes the generated tables into the README.
"""

import argparse
import itertools
import re
import shlex
import string
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from llama_lib import host
from llama_lib.__main__ import COMMANDS
from llama_lib.__main__ import main as llama_lib_main
from llama_lib.cluster import launch
from llama_lib.cluster.hostfile import read_hostfile
from llama_lib.config import DEPRECATED, SCRIPTS, options_table, parse_options
from llama_lib.errors import UserError
from llama_lib.layout import accumulation_of, layout_of, layout_problems
from llama_lib.models import MODELS, model_config
from llama_lib.option_tree import SECTIONS
from llama_lib.options import declared

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"(<!-- options:(\w+) -->\n).*?(<!-- /options -->)", re.S)

# What stands on a page where the reader has something of his own.
PLACEHOLDERS = {"YOUR_GPU_PER_NODE": "8"}
HOSTS = 4  # as many as the sample host file has
# Programs of other people, whose arguments are not ours to check.
TOOLS = {"cd", "cp", "cat", "export", "ip", "mkdir", "nvidia-smi", "ssh", "ssh-copy-id", "touch"}
TOOLS |= {"tensorboard", ".venv/bin/pip", "pip", "git", "srun", "sbatch", "source", "echo"}


class Command(NamedTuple):
    page: str
    words: list[str]


def commands() -> Iterator[Command]:
    """Every command of the fenced bash and console blocks, as the shell would split it."""
    for page in PAGES:
        for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", page.read_text(), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;<>")
                lexer.whitespace_split = True
                for is_border, part in itertools.groupby(lexer, lambda w: set(w) <= set("&|;")):
                    words = list(part)
                    while words and re.match(r"[A-Z_]+=", words[0]):
                        words.pop(0)
                    if words and not is_border:
                        words = [PLACEHOLDERS.get(word, word) for word in words]
                        yield Command(page.name, words)


ALL = list(commands())


class Parsed(Exception):
    """Raised in place of running a command; holds its parser."""


def parser_of(monkeypatch: pytest.MonkeyPatch, argv: list[str], *, parsing: bool) -> Any:
    """The parser of `python -m llama_lib argv`; with `parsing`, SystemExit if it refuses argv."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        if parsing:
            parse_args(self, args, namespace)
        raise Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as caught:
        llama_lib_main(argv)
    return caught.value.args[0]


@cache
def torchrun_parser() -> argparse.ArgumentParser:
    from torch.distributed.run import get_args_parser

    return get_args_parser()


@cache
def colossalai_run() -> Any:
    host.install()
    from colossalai.cli.launcher import run

    return run


def check_script(program: str, argv: list[str], processes: int) -> None:
    """The options are read, and the numbers fit each other, the model and the processes."""
    if "--help" in argv or any("OTHER" in word for word in argv):
        return
    if "--spec_file" in argv and not (ROOT / argv[argv.index("--spec_file") + 1]).is_file():
        return  # written by a run
    script = program.removesuffix(".py")
    assert program == f"{script}.py" and script in SCRIPTS
    options = parse_options(script, argv)
    name = options.model.config
    if name not in MODELS or options.model.model_path is not None:
        return
    config = model_config(name)
    assert layout_problems(options, processes, config) == []
    length = min(options.model.max_length, config.max_position_embeddings)
    accumulation = accumulation_of(options, layout_of(options, processes).dp, length)
    assert isinstance(accumulation, int), accumulation


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = command.words
    if program == "make":
        targets = [word for word in rest if "=" not in word and not word.startswith("-")]
        missing = [t for t in targets if not re.search(rf"^{t}:", makefile(), re.M)]
        assert not missing, f"the Makefile has no {missing}"
    elif program == "torchrun":
        arguments = torchrun_parser().parse_args(rest)
        hosts = int(arguments.nnodes.split(":")[-1])
        per_host = int(arguments.nproc_per_node)
        check_script(arguments.training_script, arguments.training_script_args, hosts * per_host)
    elif program == "colossalai":
        assert rest[0] == "run"
        given = colossalai_run().make_context("run", rest[1:]).params
        named = (given["host"] or "").split(",")
        hosts = HOSTS if given["hostfile"] else len(named)
        user_args = list(given["user_args"])
        check_script(given["user_script"], user_args, hosts * given["nproc_per_node"])
    elif program == "bash" and rest[0] == "scripts/launch.sh":
        check_launch(rest[1:])
    elif program == "bash":
        # The scripts themselves are run by tests/test_scripts.py.
        assert list((ROOT / "scripts").rglob(rest[0])), f"no script {rest[0]}"
        check_script("benchmark.py", ["-c", "7b", *rest[1:]], 8)
    elif Path(program).name.startswith("python"):
        if rest[:3] == ["-m", "llama_lib", "launch"]:
            check_launch(rest[3:])
        elif rest[:2] == ["-m", "llama_lib"]:
            parser_of(monkeypatch, rest[2:], parsing=True)
        elif rest and rest[0].endswith(".py"):
            check_script(rest[0], rest[1:], 1)
        else:
            assert rest[:2] == ["-m", "venv"] or rest[:1] == ["-c"], rest
    else:
        assert program in TOOLS, f"{program}: a command no test knows"


def check_launch(argv: list[str]) -> None:
    """The launcher's own options, the host file where it is ours, and the script's options."""
    own, command = launch.split(argv)
    arguments = launch._parser().parse_args(own)
    hosts = 1
    if arguments.hostfile is not None:
        hosts = arguments.num_nodes or HOSTS
        if arguments.hostfile.startswith("hostfiles/"):
            assert len(read_hostfile(ROOT / arguments.hostfile)) >= hosts
    check_script(command[0], command[1:], hosts * (arguments.nproc_per_node or 1))


def makefile() -> str:
    return (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("command", ALL, ids=lambda c: f"{c.page}: {' '.join(c.words)[:60]}")
def test_command_is_accepted_by_its_parser(command, monkeypatch):
    check(command, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "python pretrain.py --epochs 2",
        "python pretrain.py -c 7b -p zero2 --tp 2",
        "python pretrain.py -c 7b --global_batch_tokens 4m",
        "torchrun --nproc_per_node 3 pretrain.py -c 7b -p hybrid_parallel --tp 2",
        "torchrun --nproc 3 --nothing pretrain.py",
        "colossalai run --nproc_per_node many pretrain.py",
        "python -m llama_lib verify",
        "python -m llama_lib generate checkpoint --prompts x",
        "make everything",
        "bash missing.sh",
        "bash gemini.sh --batch 2",
        "bash scripts/launch.sh --hosts a pretrain.py",
        "python -m llama_lib launch --nproc_per_node 2 pretrain.py --epochs 2",
        "python -m llama_lib launch --hostfile hostfiles/two_hosts.txt --num_nodes 3 pretrain.py",
        "fdisk -l",
    ],
)
def test_a_wrong_command_would_be_found(line, monkeypatch):
    with pytest.raises((AssertionError, UserError, SystemExit, click.UsageError)):
        check(Command("", line.split()), monkeypatch)


def test_the_readme_shows_every_way_to_start():
    lines = [" ".join(command.words) for command in ALL if command.page == "README.md"]
    starts = ["make pretrain", "make test", "torchrun ", "colossalai run ", "python pretrain.py "]
    starts += ["sbatch "]
    starts += [
        f"python -m llama_lib {name}"
        for name in ("prepare", "verify", "generate", "doctor", "launch")
    ]
    assert [s for s in starts if not any(line.startswith(s) for line in lines)] == []


# -- tables, flags and names ---------------------------------------------------------------------


def with_current_tables(text: str) -> str:
    """Every table of options as it is now; that of finetune.py has what pretrain.py has not."""

    def table(script: str) -> str:
        return options_table(script, None if script == "pretrain" else "pretrain")

    return TABLE.sub(lambda found: f"{found[1]}\n{table(found[2])}\n{found[3]}", text)


def test_options_tables_are_current():
    scripts = [found[2] for page in PAGES for found in TABLE.finditer(page.read_text())]
    assert sorted(scripts) == sorted(SCRIPTS)
    for page in PAGES:
        text = page.read_text()
        assert text == with_current_tables(text), "stale: run `python -m tests.test_docs`"


def known_flags(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    options = [item for script in SCRIPTS for item in declared(SECTIONS, script).values()]
    flags = {flag for item in options for flag in item.flags} | {f"--{old}" for old in DEPRECATED}
    flags |= {flag.replace("--", "--no-", 1) for flag in flags if flag.startswith("--")}
    flags |= {"--help", "--spec_file", "--no-deps", "--logdir"}
    for name in COMMANDS:
        with monkeypatch.context() as patched:
            parser = parser_of(patched, [name], parsing=False)
        flags |= {flag for action in parser._actions for flag in action.option_strings}
    for action in torchrun_parser()._actions:
        flags |= set(action.option_strings)
    return flags | {flag for option in colossalai_run().params for flag in option.opts}


def test_every_flag_named_on_a_page_exists(monkeypatch):
    known = known_flags(monkeypatch)
    unknown = [
        f"{page.name}: {flag}"
        for page in PAGES
        for code in re.findall(r"`([^`\n]+)`", page.read_text())
        for flag in re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)*", code)
        if flag not in known
    ]
    assert unknown == []


def test_the_readme_names_every_model_and_command():
    text = (ROOT / "README.md").read_text()
    words = set(re.findall(r"[\w.-]+", text))
    assert [name for name in [*MODELS, *COMMANDS] if name not in words] == []


def test_every_patch_is_explained():
    host.install()
    from llama_lib.host.patches import PATCHES

    text = (ROOT / "docs" / "cpu.md").read_text()
    named = re.findall(r"^\| `(\w+)` \|", text, re.M)
    assert sorted(named) == sorted(patch.name for patch in PATCHES)


def test_every_metric_is_explained():
    from llama_lib.metrics import StepRecord

    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| (`.*?`) \|", text, re.M)
    named = [key for row in rows for key in re.findall(r"`(\w+)`", row)]
    assert named == list(StepRecord.__dataclass_fields__)


# -- links, paths, code --------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """GitHub's names for the headings of a page."""
    kept = string.ascii_letters + string.digits + " -_"
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {"".join(c for c in head if c in kept).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_internal_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_path_of_a_machine(page):
    found = re.findall(r"(?<![\w.~])/(?:home|root|work|tmp|mnt|Users)\b\S*", page.read_text())
    assert found == []
    assert page.read_text().isascii()


@pytest.mark.parametrize("page", ["README.md", "docs/finetune.md"])
def test_the_python_of_a_page_runs(tmp_path, capsys, page):
    from transformers import LlamaForCausalLM

    from llama_lib.data.chat.templates import use_template
    from llama_lib.data.tokenizer import save_tokenizer, train_tokenizer

    tokenizer = train_tokenizer(["The with statement is used"] * 9, 280)
    use_template(tokenizer, "llama-2", ())
    save_tokenizer(tokenizer, tmp_path / "model")
    config = MODELS["tiny"]()
    config.update({"vocab_size": 280, "num_hidden_layers": 1})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)
    folder = repr(str(tmp_path / "model"))
    code, changed = re.subn(r'"checkpoint[\w-]*/step-\d{8}/model"', folder, code)
    assert changed == 1 and len(code.strip().splitlines()) <= 12
    names: dict[str, Any] = {}
    exec(compile(code, page, "exec"), names)
    printed = capsys.readouterr().out
    if page == "README.md":
        assert "The with statement" in printed
    else:
        # A model without training answers anything; what it is asked is what counts.
        asked = names["tokenizer"].decode(names["inputs"]["input_ids"][0])
        assert asked == "<s>[INST] What does heapq.heappush do? [/INST]"
        assert printed.strip() != asked


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "The llama_lib authors" in text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_current_tables(page.read_text()))
