"""Nothing that is read runs code, nothing that is written or shown holds a secret."""

import ast
import json
import logging
import os
import pickle
import re
import shutil
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import finetune
import pretrain
from llama_lib import private
from llama_lib.__main__ import main as command_main
from llama_lib.cli import run_command
from llama_lib.config import dump_yaml, parse_options
from llama_lib.data import shared
from llama_lib.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from llama_lib.errors import UserError
from llama_lib.models import model_config
from llama_lib.resume import option_differences
from tests.refused import Ended

ROOT = Path(__file__).parents[1]


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Hugging Face folder, its text and its conversations beside it."""
    folder = tmp_path_factory.mktemp("safe")
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer = train_tokenizer(["say the cat sat on the mat"] * 50, 280)
    save_tokenizer(tokenizer, folder / "tokenizer")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"the cat sat on mat {n}"}) + "\n" for n in range(200))
    )
    turns = [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "the cat"}]
    (folder / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    return folder


class Trap:
    """A folder to put evil files in, and what must never come to be."""

    def __init__(self, folder: Path, good: Path) -> None:
        self.folder, self.good = folder, good
        self.marker = folder / "the code was run"
        self.pickled = pickle.dumps(Evil(self.marker))
        self.code = f"import os\nos.mkdir({str(self.marker)!r})\n"

    def model(self) -> Path:
        """A copy of the good model, to be spoilt."""
        return Path(shutil.copytree(self.good / "model", self.folder / "model"))

    def edit(self, path: Path, **values: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def with_code(self, folder: Path, *names: str) -> None:
        """Modules of these names, and the files that a loading script would be."""
        for name in names:
            (folder / f"{name}.py").write_text(
                f"{self.code}\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
            )


@pytest.fixture
def trap(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Trap:
    """Whoever is asked on the terminal says yes: there must be no question."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    monkeypatch.setattr("llama_lib.run.train", lambda *_: 0)
    return Trap(tmp_path, model)


Refuse = Callable[..., str]


@pytest.fixture
def refuse(trap: Trap, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """The message of a command that has to be refused without running what it was given."""

    def refused(main: Callable[[list[str]], int | None], *argv: str) -> str:
        code = run_command(main, list(argv))
        ended = Ended(code, *capsys.readouterr())
        assert not trap.marker.exists(), "code of a file was run"
        assert ended.code in (1, 2), ended
        assert "Traceback" not in ended.err
        message = ended.err.strip().splitlines()
        assert message, ended
        return ended.err

    return refused


def pretraining(trap: Trap, **flags: str) -> list[str]:
    right = {
        "-c": "tiny",
        "-l": "32",
        "-d": str(trap.good / "text.jsonl"),
        "--tokenizer": str(trap.good / "tokenizer"),
        "--cache_dir": "cache",
        "--workers": "1",
    }
    given = right | {name: value for name, value in flags.items() if value}
    return [word for pair in given.items() for word in pair]


def finetuning(trap: Trap, *argv: str) -> list[str]:
    right = ["-l", "48", "-d", str(trap.good / "chats.jsonl"), "--cache_dir", "cache"]
    return [*right, "--workers", "1", *argv]


def test_the_trap_works(trap: Trap) -> None:
    pickle.loads(trap.pickled)
    assert trap.marker.is_dir()


# -- data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("evil.pkl", "evil.pickle", "evil.pt", "evil.npy", "evil.npz", "evil.bin", "evil.py"),
        *("evil.jsonl", "evil.json", "evil.parquet", "evil.arrow", "evil.jsonl.gz", "evil.txt"),
    ],
)
def test_pickled_data_are_refused(trap: Trap, refuse: Refuse, name: str) -> None:
    path = trap.folder / name
    path.write_bytes(trap.pickled)
    assert name in refuse(pretrain.main, *pretraining(trap, **{"-d": str(path)}))
    assert name in refuse(
        finetune.main, *finetuning(trap, "--model_path", str(trap.good / "model"), "-d", str(path))
    )


def test_saved_arrays_and_tensors_are_refused(trap: Trap, refuse: Refuse) -> None:
    np.save(trap.folder / "objects.npy", np.array([Evil(trap.marker)], object), allow_pickle=True)
    torch.save({"text": Evil(trap.marker)}, trap.folder / "tensors.pt")
    for name in ("objects.npy", "tensors.pt"):
        assert "unsupported kind of file" in refuse(
            pretrain.main, *pretraining(trap, **{"-d": str(trap.folder / name)})
        )
    # The project's own arrays, in --cache_dir, are read without pickles too.
    with pytest.raises(ValueError, match="object"):
        shared._mapped(trap.folder / "objects.npy")
    assert not trap.marker.exists()


def test_a_pickle_as_token_file_is_refused(trap: Trap, refuse: Refuse) -> None:
    for suffix in ("bin", "idx"):
        (trap.folder / f"tokens.{suffix}").write_bytes(trap.pickled)
    assert "tokens" in refuse(
        pretrain.main, *pretraining(trap, **{"-d": str(trap.folder / "tokens")})
    )


def test_a_prepared_folder_of_pickles_is_refused(trap: Trap, refuse: Refuse) -> None:
    folder = trap.folder / "prepared"
    folder.mkdir()
    for name in ("manifest.json", "text.bin", "text.idx"):
        (folder / name).write_bytes(trap.pickled)
    assert str(folder) in refuse(pretrain.main, *pretraining(trap, **{"-d": str(folder)}))


def test_a_loading_script_beside_data_is_not_run(
    trap: Trap, capsys: pytest.CaptureFixture[str]
) -> None:
    """datasets used to run FOLDER/FOLDER.py; the files beside it are data all the same."""
    folder = trap.folder / "corpus"
    folder.mkdir()
    trap.with_code(folder, "corpus", "__init__", "dataset")
    shutil.copy(trap.good / "text.jsonl", folder)
    code = run_command(pretrain.main, [*pretraining(trap, **{"-d": str(folder)}), "--check"])
    assert (code, trap.marker.exists()) == (0, False), capsys.readouterr()


def pickling_schema(trap: Trap) -> pa.Schema:
    """As pyarrow before 14.0.1 unpickled it when a file was opened (CVE-2023-47248)."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": trap.pickled,
    }
    return pa.schema([pa.field("text", pa.string(), metadata=metadata)])


@pytest.mark.parametrize("name", ["evil.parquet", "evil.arrow"])
def test_the_type_of_a_column_is_not_unpickled(
    trap: Trap, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = trap.folder / name
    table = pa.table({"text": [f"the cat {n}" for n in range(300)]}, schema=pickling_schema(trap))
    if name.endswith("parquet"):
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    assert trap.pickled in path.read_bytes() or name.endswith("parquet")
    code = run_command(pretrain.main, [*pretraining(trap, **{"-d": str(path)}), "--check"])
    ended = capsys.readouterr()
    assert not trap.marker.exists()
    assert "Traceback" not in ended.err
    assert code == 0 or name in ended.err


def test_a_saved_dataset_of_pickles_is_refused(trap: Trap, refuse: Refuse) -> None:
    folder = trap.folder / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )
    (folder / "data-00000-of-00001.arrow").write_bytes(trap.pickled)
    assert str(folder) in refuse(pretrain.main, *pretraining(trap, **{"-d": str(folder)}))


# -- models and tokenizers -------------------------------------------------------------------------


def test_pickled_weights_are_refused(trap: Trap, refuse: Refuse) -> None:
    folder = trap.model()
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil(trap.marker)}, folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(trap.pickled)
    message = refuse(finetune.main, *finetuning(trap, "--model_path", str(folder)))
    assert "safetensors only (pickled .bin files can run code)" in message
    assert "safetensors" in refuse(command_main, "generate", str(folder), "--prompt", "cat")
    assert "safetensors" in refuse(
        command_main, "evaluate", str(folder), "-d", str(trap.good / "text.jsonl")
    )


@pytest.mark.parametrize("index", [False, True])
def test_pickles_in_the_name_of_safetensors_are_refused(
    trap: Trap, refuse: Refuse, index: bool
) -> None:
    folder = trap.model()
    (folder / "model.safetensors").write_bytes(trap.pickled)
    if index:
        names = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).state_dict()
        (folder / "model.safetensors").rename(folder / "pytorch_model-00001.bin")
        weight_map = dict.fromkeys(names, "pytorch_model-00001.bin")
        content = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    message = refuse(finetune.main, *finetuning(trap, "--model_path", str(folder)))
    assert f"--model_path {folder} is damaged or not complete" in message
    assert str(folder) in refuse(command_main, "generate", str(folder), "--prompt", "cat")


AUTO_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}


def test_a_model_that_is_code_is_refused(trap: Trap, refuse: Refuse) -> None:
    folder = trap.model()
    trap.with_code(folder, "evil")
    trap.edit(folder / "config.json", model_type="evil", auto_map=AUTO_MAP)
    for argv in (["-c", str(folder)], ["--model_path", str(folder)]):
        message = refuse(pretrain.main, *pretraining(trap), *argv)
        assert "'evil', expected one of llama, mistral" in message
    assert "never run" in refuse(command_main, "generate", str(folder), "--prompt", "cat")
    assert "never run" in refuse(
        command_main, "evaluate", str(folder), "-d", str(trap.good / "text.jsonl")
    )


def test_code_beside_a_known_model_is_left_out(trap: Trap) -> None:
    """A Llama is read as one; what is saved names no code that would be run elsewhere."""
    folder = trap.model()
    trap.with_code(folder, "evil")
    trap.edit(folder / "config.json", auto_map=AUTO_MAP)
    trap.edit(folder / "tokenizer_config.json", auto_map=AUTO_MAP)
    assert not hasattr(model_config(str(folder)), "auto_map")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.save_pretrained(trap.folder / "saved")
    assert "evil" not in (trap.folder / "saved" / "tokenizer_config.json").read_text()
    assert not trap.marker.exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tokenizer_class": "EvilTokenizer", "auto_map": AUTO_MAP}, "which is never run"),
        ({"tokenizer_class": None, "auto_map": AUTO_MAP}, "no tokenizer can be loaded"),
        # The one class of transformers whose vocabulary is a pickle.
        ({"tokenizer_class": "TransfoXLTokenizer"}, "no tokenizer can be loaded"),
    ],
)
def test_a_tokenizer_that_is_code_is_refused(
    trap: Trap, refuse: Refuse, settings: dict[str, Any], reason: str
) -> None:
    folder = Path(shutil.copytree(trap.good / "tokenizer", trap.folder / "tokenizer"))
    trap.with_code(folder, "evil")
    trap.edit(folder / "tokenizer_config.json", **settings)
    for name in ("vocab.pkl", "vocab.bin"):
        (folder / name).write_bytes(trap.pickled)
    if settings["tokenizer_class"] is None:
        (folder / "config.json").write_text('{"model_type": "evil"}')
    assert reason in refuse(pretrain.main, *pretraining(trap, **{"--tokenizer": str(folder)}))


TEMPLATES = [
    "{{ self.__init__.__globals__.__builtins__.__import__('os').mkdir('MARKER') }}",
    "{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}",
    "{{ namespace.__init__.__globals__['__builtins__']['__import__']('os').mkdir('MARKER') }}",
    "{% for c in ().__class__.__base__.__subclasses__() %}"
    "{% if c.__name__ == '_wrap_close' %}{{ c.__init__.__globals__['mkdir']('MARKER') }}"
    "{% endif %}{% endfor %}",
    "{{ raise_exception.__globals__['os'].mkdir('MARKER') }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_reaches_nothing(trap: Trap, refuse: Refuse, template: str) -> None:
    template = template.replace("MARKER", str(trap.marker))
    template += "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    (trap.folder / "evil.jinja").write_text(template)
    arguments = finetuning(trap, "--model_path", str(trap.good / "model"))
    assert "chat template" in refuse(finetune.main, *arguments, "--chat_template", "evil.jinja")
    folder = trap.model()
    trap.edit(folder / "tokenizer_config.json", chat_template=template)
    arguments = finetuning(trap, "--model_path", str(folder))
    assert "chat template" in refuse(finetune.main, *arguments)
    assert "template" in refuse(command_main, "generate", str(folder), "--chat", "--prompt", "cat")


def adapters(trap: Trap) -> Path:
    """A folder of adapters of the good model."""
    from peft import LoraConfig, get_peft_model

    base = LlamaForCausalLM.from_pretrained(trap.good / "model")
    folder = trap.folder / "adapter"
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    trap.edit(folder / "adapter_config.json", base_model_name_or_path=str(trap.good / "model"))
    shutil.copytree(trap.good / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def test_good_adapters_are_taken(trap: Trap, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", str(adapters(trap)), "--prompt", "cat", "--max_new_tokens", "2"]
    assert run_command(command_main, argv) == 0, capsys.readouterr()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "safetensors only"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING, expected LORA"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil.core"}, "with megatron_config"),
    ],
)
def test_adapters_that_could_run_code_are_refused(
    trap: Trap,
    refuse: Refuse,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    expected: str,
) -> None:
    folder = adapters(trap)
    trap.with_code(trap.folder, "evil")
    monkeypatch.syspath_prepend(trap.folder)
    trap.edit(folder / "adapter_config.json", **settings)
    if not settings:
        (folder / "adapter_model.safetensors").unlink()
        torch.save({"x": Evil(trap.marker)}, folder / "adapter_model.bin")
    assert expected in refuse(command_main, "generate", str(folder), "--prompt", "cat")


# -- files of options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "lr: !!python/object/apply:os.mkdir [MARKER]",
        "!!python/object/apply:os.mkdir [MARKER]",
        "training: !!python/object/new:os.mkdir [MARKER]",
        "dataset: [!!python/object/apply:os.mkdir [MARKER]]",
    ],
)
def test_a_file_of_options_makes_no_objects(trap: Trap, refuse: Refuse, text: str) -> None:
    (trap.folder / "evil.yaml").write_text(text.replace("MARKER", str(trap.marker)))
    arguments = pretraining(trap)
    place = arguments.index("-d")  # a flag would beat the file
    arguments = [*arguments[:place], *arguments[place + 2 :]]
    assert "evil.yaml" in refuse(pretrain.main, *arguments, "--spec_file", "evil.yaml")
    mixture = [*("prepare", "-d", str(trap.good / "text.jsonl"), "--tokenizer")]
    mixture += [str(trap.good / "tokenizer"), "--output", "out", "--num_token", "32:1k"]
    assert "evil.yaml" in refuse(command_main, *mixture, "--mixture", "evil.yaml")


def test_a_run_folder_with_an_evil_file_of_options_is_refused(trap: Trap, refuse: Refuse) -> None:
    run = trap.folder / "run"
    run.mkdir()
    (run / "specs.yaml").write_text(
        f"model:\n  config: !!python/object/apply:os.mkdir [{trap.marker}]\n"
    )
    part = {"step": 1, "num_steps": 9, "global_batch": 2, "identity": "x"}
    part["position"] = {"step": 0, "sample": 0, "skips": []}
    (run / "ledger.jsonl").write_text(json.dumps({"step": 1, "part": part}) + "\n")
    assert "specs.yaml" in refuse(command_main, "inspect", str(run), "--step", "1")


# -- the code itself -------------------------------------------------------------------------------

FORBIDDEN_CALLS = {
    *("pickle.load", "pickle.loads", "torch.load", "yaml.load", "yaml.unsafe_load"),
    *("yaml.full_load", "eval", "exec", "os.system", "os.popen", "joblib.load"),
    *("pd.read_pickle", "pandas.read_pickle", "marshal.loads", "shelve.open"),
}
PROGRAM = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "llama_lib").rglob("*.py"))]


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_the_program_has_no_way_to_run_what_it_reads() -> None:
    for path in PROGRAM:
        for name, call in calls(path):
            assert name not in FORBIDDEN_CALLS, f"{path}:{call.lineno}: {name}"
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert given.get("trust_remote_code", "False") == "False", f"{path}:{call.lineno}"
            assert given.get("allow_pickle", "False") == "False", f"{path}:{call.lineno}"
            assert given.get("weights_only", "True") == "True", f"{path}:{call.lineno}"
            assert given.get("shell", "False") == "False", f"{path}:{call.lineno}"


def test_whatever_chooses_a_class_by_name_is_told_not_to_run_code() -> None:
    """Where nothing is said transformers asks on the terminal."""
    found = 0
    for path in PROGRAM:
        for name, call in calls(path):
            if name.endswith(".from_pretrained") and ("Auto" in name or "_class_of" in name):
                given = {word.arg for word in call.keywords}
                assert "trust_remote_code" in given, f"{path}:{call.lineno}"
                found += 1
    assert found >= 2


# What listens where others can reach it, in commands and in code.
OPEN = re.compile(r"--bind_all|(--host|--ip|--listen)[ =]+(?!localhost|127\.|\[?::1)")
# Test hosts have networks of their own, with no way to or from the machine's.
WITHIN_NAMESPACES = ("tests/cluster/hosts.py",)


def test_servers_of_tests_and_docs_listen_on_loopback() -> None:
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "scripts").rglob("*.*")]
    texts += [*(ROOT / "tests").rglob("*.py"), *PROGRAM, ROOT / "Makefile"]
    for path in texts:
        name = str(path.relative_to(ROOT))
        if not path.is_file() or name in WITHIN_NAMESPACES or path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        assert not OPEN.search(text), f"{name}: {OPEN.search(text)}"
    servers = 0
    for path in [*(ROOT / "tests").rglob("*.py"), *PROGRAM]:
        for name, call in calls(path):
            kind = name.split(".")[-1]
            if kind in ("HTTPServer", "ThreadingHTTPServer", "TCPServer") or (
                kind == "create_server" and path.is_relative_to(ROOT / "tests")
            ):
                place = ast.unparse(call.args[0])
                assert place.startswith(("('127.0.0.1',", "('localhost',")), f"{path}:{call.lineno}"
                servers += 1
    assert servers, "the hub of the tests is a server"


# -- secrets ---------------------------------------------------------------------------------------

TOKEN = "hf_Zq8vK3mNbW7xYtR2"


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_APIKEY", "MY_PASSWORD"),
        *("AWS_SECRET_ACCESS_KEY", "DB_PASSWD", "github_token", "TOKEN", "GCP_CREDENTIALS"),
    ],
)
def test_values_of_secret_variables_are_masked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, TOKEN)
    assert private.masked(f"header: Bearer {TOKEN}, twice {TOKEN}") == (
        "header: Bearer ***, twice ***"
    )


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hiding a common word or a path would spoil every message, and the options of a run."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "allowed-values",
        "HF_TOKEN_PATH": "/somewhere/else/token",
        "SSH_KEY": str(tmp_path),
        "MAX_TOKEN": "1048576000",
        "SORT_KEY": "checkpoint",
        "SHORT_KEY": "abc12",
    }.items():
        monkeypatch.setenv(name, value)
        text = f"--save_dir {value}/run of {value}"
        assert private.masked(text) == text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("https://me:hunter2@host/path", "https://me:***@host/path"),
        ("get 's3://key:p@ss@host:9000/b' now", "get 's3://key:***@host:9000/b' now"),
        ("https://ghp_abcdefghijklmnop@github.com/x", "https://***@github.com/x"),
        ("http://:pw@proxy:3128", "http://:***@proxy:3128"),
        ("saved s3:/key:pw@bucket/run", "saved s3:/key:***@bucket/run"),
        (
            "https://cdn/x?X-Amz-Credential=AK/1&X-Amz-Signature=ab12&part=3",
            "https://cdn/x?X-Amz-Credential=***&X-Amz-Signature=***&part=3",
        ),
        ("https://host/x?access_token=abc", "https://host/x?access_token=***"),
        # These hold none.
        ("ssh://git@github.com/x", "ssh://git@github.com/x"),
        ("https://host:8080/a?page=2", "https://host:8080/a?page=2"),
        ("mail me@host: 3:4", "mail me@host: 3:4"),
        ("10:30:00 tcp://127.0.0.1:29500", "10:30:00 tcp://127.0.0.1:29500"),
    ],
)
def test_passwords_in_addresses_are_masked(shown: str, expected: str) -> None:
    assert private.masked(shown) == expected


def test_a_secret_is_found_in_other_spellings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", 'a+b/c"d=Longer\u00e9')
    for text in (
        "?x=a%2Bb%2Fc%22d%3DLonger%C3%A9",
        json.dumps({"k": os.environ["AWS_SECRET_ACCESS_KEY"]}),
    ):
        assert "Longer" not in private.masked(text)


def test_log_files_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    handler = logging.FileHandler(tmp_path / "log")
    handler.setFormatter(private.LogFormatter("%(message)s"))
    log = logging.getLogger("a test of secrets")
    log.addHandler(handler)
    try:
        raise ValueError(f"Authorization: Bearer {TOKEN}")
    except ValueError:
        log.exception("asked %s with %s", "https://u:hunter2@hub", TOKEN)
    handler.close()
    text = (tmp_path / "log").read_text()
    assert "Traceback" in text and "Bearer ***" in text
    assert TOKEN not in text and "hunter2" not in text


def test_options_are_stored_masked_and_a_masked_file_is_not_taken_for_one(
    tmp_path: Path,
) -> None:
    address = "https://me:hunter2@host/prompts"
    flags = ["--model_path", "x", "--sample_prompts", address, "--sample_interval", "5"]
    options = parse_options("finetune", flags)
    assert options.report.sample_prompts == [address], "the run itself has the real one"
    dump_yaml(options, tmp_path / "specs.yaml")
    stored = (tmp_path / "specs.yaml").read_text()
    assert "hunter2" not in stored and "https://me:***@host/prompts" in stored

    # A resumed run compares what was stored with what it would store.
    assert option_differences(options.to_dict(), options.to_dict()) == []
    other = parse_options("finetune", [*flags[:-1], "7"])
    assert option_differences(options.to_dict(), other.to_dict()) == [
        "--sample_interval was 5, now 7"
    ]
    again = ["--spec_file", str(tmp_path / "specs.yaml")]
    with pytest.raises(UserError, match=r"sample_prompts: the file holds \*\*\* where a password"):
        parse_options("finetune", again)
    known = parse_options("finetune", [*again, "--sample_prompts", address])
    assert known.report.sample_prompts == [address]


# -- what is written -------------------------------------------------------------------------------


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch):
    """The streams and the umask as they were, after a test that protects its process."""
    before = os.umask(0o022)
    os.umask(before)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    yield
    os.umask(before)


@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0, 0o664, 0o775), (0o022, 0o644, 0o755), (0o077, 0o600, 0o700)]
)
def test_only_everyones_right_to_write_is_taken_away(
    umask: int, file: int, folder: int, tmp_path: Path
) -> None:
    os.umask(umask)
    private.protect()
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == file
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == folder


@pytest.mark.usefixtures("unguarded")
def test_what_is_printed_is_masked_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    private.protect()
    private.protect()
    print("token", TOKEN, flush=True)
    sys.stdout.writelines(["line ", f"{TOKEN}\n"])
    print(f"no way to https://u:hunter2@hub/{TOKEN}", file=sys.stderr)
    assert sys.stdout.isatty() is False
    assert capsys.readouterr() == ("token ***\nline ***\n", "no way to https://u:***@hub/***\n")


def test_a_folder_that_everyone_may_write_to_is_one_warning(
    trap: Trap, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = {"run": 0o777, "cache": 0o757, "tb": 0o1777, "fine": 0o775}
    for name, mode in modes.items():
        (trap.folder / name).mkdir()
        (trap.folder / name).chmod(mode)
    check = partial(run_command, pretrain.main)
    argv = [*pretraining(trap), "--check", "-o", "run", "-t", "tb"]
    assert check(argv) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "every user" in line]
    assert [line.split()[:3] for line in warnings] == [
        ["warning:", "--save_dir", "run"],
        ["warning:", "--cache_dir", "cache"],
    ]
    (trap.folder / "cache").chmod(0o755)
    assert check([*pretraining(trap), "--check", "-o", "fine", "-t", "tb"]) == 0
    assert "every user" not in capsys.readouterr().out
