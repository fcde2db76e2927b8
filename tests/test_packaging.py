"""What is installed, and what a source distribution holds."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import dp2vae_fast
from dp2vae_fast.ops import _op

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("csrc", "kernels", "dp2vae_fast", "tests", "benchmarks", "docs")


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None or os.environ.get("DP2VAE_FAST_NATIVE") == "0",
    reason="there is no C++ compiler, or the native module is not wanted",
)
def test_the_native_module_is_there_where_it_can_be_built():
    """Where its build has failed, the tests of its kernels are skipped in silence: they must not pass for it."""
    assert _op._native_gap == ""


def test_a_source_distribution_holds_all_that_it_is_built_and_tested_from(tmp_path):
    """Also where it is made without a compiler and without torch, which know of the sources otherwise."""
    copy = tmp_path / "copy"
    for folder in BUILT_FROM:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, copy)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--formats=gztar", "--dist-dir", tmp_path],
        cwd=copy,
        env={**os.environ, "DP2VAE_FAST_NATIVE": "0", "DP2VAE_FAST_CUDA": "0"},
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    files = [file.relative_to(copy) for folder in BUILT_FROM for file in (copy / folder).rglob("*") if file.is_file()]
    wanted = {str(file) for file in files if file.suffix != ".pyc"}
    assert len(wanted) > 200 and wanted - names == set()
    assert {"Makefile", "requirements.txt", "LICENSE", "README.md", "CHANGELOG.md", "setup.py"} <= names


def test_the_command_line_without_its_extra_is_one_line():
    code = "import sys; sys.modules['typer'] = None; from dp2vae_fast.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == 'dp2vae: error: it needs typer: pip install "dp2vae_fast[train]"\n'


def test_the_engine_and_the_ops_need_no_extra():
    extras = ("typer", "rich", "sklearn", "PIL", "matplotlib", "safetensors", "torchmetrics", "datasets")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({extras!r}))\n"
        "import dp2vae_fast, torch\n"
        "from dp2vae_fast import PrivacyEngine, ops\n"
        "model = torch.nn.Linear(3, 2)\n"
        "data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3)), batch_size=4)\n"
        "model, optimizer, data = PrivacyEngine().make_private(module=model, data_loader=data, noise_multiplier=1.0,\n"
        "    optimizer=torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=1.0)\n"
        "for (x,) in data:\n"
        "    model(x).square().sum(1).mean().nan_to_num().backward()\n"
        "    optimizer.step()\n"
        "from dp2vae_fast import audit_engine\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_version_is_the_same_wherever_it_stands():
    project, citation = ((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CITATION.cff"))
    assert f'\nversion = "{dp2vae_fast.__version__}"\n' in project
    assert f"\nversion: {dp2vae_fast.__version__}\n" in citation
