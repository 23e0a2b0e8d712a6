"""What other hosts are given of this shell's variables."""

import pytest

from llama_lib.cluster.environment import names_of, passed_on, without_launcher
from llama_lib.errors import UserError

SHELL = {
    "PATH": "/usr/bin",
    "HOME": "/home/me",
    "HOSTNAME": "login1",
    "NCCL_SOCKET_IFNAME": "=eth0",
    "HF_HOME": "/data/hf",
    "HF_TOKEN": "hf_abcdefgh",
    "WANDB_API_KEY": "0123456789abcdef",
    "WANDB_MODE": "offline",
    "LS_COLORS": "rs=0:di=01;34",
    "CUDA_VISIBLE_DEVICES": "3",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_HOSTID": "login1",
    "OMP_NUM_THREADS": "4",
    "https_proxy": "http://me:pass-word@proxy:3128",
    "http_proxy": "http://proxy:3128",
    "TORCH_LOGS": 'he said "hi" $HOME `id -u`\nand left',
    "MY_SECRET": "abcdefgh",
    "RANK": "3",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "outer",
}


def test_only_what_steers_the_libraries_of_a_run():
    passed = passed_on(SHELL)
    assert passed.variables == {
        name: SHELL[name]
        for name in (
            "PATH",
            "NCCL_SOCKET_IFNAME",
            "HF_HOME",
            "CUBLAS_WORKSPACE_CONFIG",
            "OMP_NUM_THREADS",
            "http_proxy",
            "TORCH_LOGS",
        )
    }


def test_what_a_run_may_miss_is_named_without_its_value():
    held = passed_on(SHELL).held
    assert held == sorted(
        [
            *("HF_TOKEN", "WANDB_API_KEY", "WANDB_MODE"),
            *("CUDA_VISIBLE_DEVICES", "NCCL_HOSTID", "https_proxy"),
        ]
    )


def test_what_is_named_is_passed_on():
    passed = passed_on(SHELL, ["HF_TOKEN", "MY_SECRET", "CUDA_VISIBLE_DEVICES"])
    assert passed.variables["HF_TOKEN"] == SHELL["HF_TOKEN"]
    assert passed.variables["MY_SECRET"] == SHELL["MY_SECRET"]
    assert passed.variables["CUDA_VISIBLE_DEVICES"] == "3"
    assert not {"HF_TOKEN", "MY_SECRET", "CUDA_VISIBLE_DEVICES"} & set(passed.held)


def test_names_that_cannot_be_passed_on():
    with pytest.raises(UserError) as caught:
        passed_on(SHELL, names_of("A=B,ABSENT,MASTER_PORT,HF_HOME,"))
    wrong, absent, ours = caught.value.problems
    assert "got 'A=B', expected names of variables" in wrong
    assert "ABSENT is not set here" in absent
    assert "MASTER_PORT is what this launcher sets" in ours


def test_an_outer_launcher_is_forgotten():
    assert without_launcher(SHELL).keys() == SHELL.keys() - {
        "RANK",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    }
    assert names_of(None) == []
