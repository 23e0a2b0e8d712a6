"""Every patch says why it is there, and refuses code it was not written for."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from llama_lib import host
from llama_lib.errors import UserError

ACTIVE = host.install()

from llama_lib.host import patches  # noqa: E402


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_importing_llama_lib_prints_nothing_and_imports_no_engine():
    outcome = python(
        "import sys, llama_lib, llama_lib.host;"
        "assert not {'torch', 'colossalai', 'transformers'} & set(sys.modules)"
    )
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "", "")


def test_install_is_quiet_repeatable_and_leaves_no_stand_in():
    outcome = python(
        "import importlib.util, sys\n"
        "from llama_lib import host\n"
        "assert host.install() == host.install()\n"
        "from colossalai.nn.optimizer import GaLoreAdamW, HybridAdam\n"
        "step = HybridAdam.step\n"
        "host.install()\n"
        "assert HybridAdam.step is step\n"
        "print('galore_torch' in sys.modules, importlib.util.find_spec('galore_torch') is None)\n"
        "GaLoreAdamW([])\n"
    )
    if importlib_finds("galore_torch"):
        pytest.skip("galore_torch is installed here, so no stand-in is made")
    assert outcome.stdout == "False True\n"
    assert "GaLoreAdamW needs the package galore_torch" in outcome.stderr
    assert "Warning" not in outcome.stderr


def importlib_finds(name: str) -> bool:
    return python(f"import {name}").returncode == 0


def test_a_missing_colossalai_is_one_sentence():
    # -S hides the installed packages, so colossalai is not there.
    outcome = python(
        "from llama_lib import host\n"
        "from llama_lib.errors import UserError\n"
        "try:\n"
        "    host.install()\n"
        "except UserError as error:\n"
        "    print(error)\n",
        "-S",
    )
    assert "colossalai is not installed" in outcome.stdout
    assert "make install" in outcome.stdout
    assert outcome.stderr == ""


def test_a_missing_dependency_of_colossalai_is_one_sentence(tmp_path):
    (tmp_path / "peft.py").write_text("import a_package_nobody_has\n")
    outcome = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from llama_lib import host\n"
        "from llama_lib.errors import UserError\n"
        "try:\n"
        "    host.install()\n"
        "except UserError as error:\n"
        "    print(error)\n",
    )
    assert "a_package_nobody_has" in outcome.stdout
    assert "make install" in outcome.stdout


def test_optional_packages_is_one_line():
    line = host.optional_packages()
    assert "\n" not in line
    assert ("apex" in line) == (not importlib_finds("apex"))


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: patch.name)
def test_every_patch_has_a_reason_and_checks_what_it_replaces(patch):
    assert len(patch.reason.split()) > 5
    assert patch.expects
    modules = {path.split(":")[0] for path in patch.expects}
    assert {path.split(":")[0] for path in patch.replaces} <= modules | {
        "colossalai.zero.gemini.gemini_optimizer",
    }


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: patch.name)
def test_changed_code_is_refused_in_one_sentence(patch):
    path = next(iter(patch.expects))
    changed = replace(patch, expects={path: "0" * 16})
    with pytest.raises(UserError) as refusal:
        patches.apply([changed])
    message = str(refusal.value)
    assert "\n" not in message
    assert patch.name in message and path in message and "make install" in message


def test_code_that_is_gone_is_refused_too():
    gone = replace(
        patches.PATCHES[0], expects={"colossalai.nn.optimizer.hybrid_adam:NoSuchAdam.step": "0"}
    )
    with pytest.raises(UserError, match="no such code"):
        patches.check(gone)


def test_one_refused_patch_leaves_all_code_alone():
    target = "colossalai.nn.optimizer.lamb:Lamb.step"
    before = patches.resolve(target)
    good = patches.Patch("good", "for this test", {target: None}, {target: patches.digest(target)})
    bad = replace(good, name="bad", expects={target: "0" * 16})
    with pytest.raises(UserError, match="bad"):
        patches.apply([good, bad])
    assert patches.resolve(target) is before


def test_only_kernels_are_active_with_a_gpu():
    """ColossalAI is told that it has CUDA once everything that would use it is imported."""
    outcome = python(
        "from llama_lib import host\n"
        "from llama_lib.host import absent\n"
        "absent.import_optimizers()\n"
        "import colossalai.booster.plugin, torch\n"
        "from colossalai.accelerator import get_accelerator, set_accelerator\n"
        "torch.cuda.is_available = lambda: True\n"
        "set_accelerator('cuda')\n"
        "print(host.install())\n"
        "print(get_accelerator().name)\n"
        "from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader\n"
        "print(CPUAdamLoader().load().__name__)\n"
        "print(FusedOptimizerLoader().load().multi_tensor_adam.__name__)\n"
    )
    assert outcome.stdout.splitlines() == [
        "['cpu_adam_torch', 'fused_optimizer_torch', 'hybrid_adam_step']",
        "cuda",
        "CpuAdamModule",
        "multi_tensor_adam",
    ], outcome.stderr
