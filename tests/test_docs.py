"""The code of the documentation does what it says, and its lists are complete."""

import json
import re
from pathlib import Path

import torch
from faults import SCENARIOS
from PIL import Image
from torch.nn import functional as F

from dp2vae_fast.config import Config
from dp2vae_fast.ops._op import OPS
from dp2vae_fast.vae.data import load_images

ROOT = Path(__file__).parents[1]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def examples(page: str, containing: str = "") -> list[str]:
    """The Python code of a page, block by block."""
    return [code for code in re.findall(r"```python\n(.*?)```", read(page), re.DOTALL) if containing in code]


def test_a_step_by_hand_takes_the_clipped_sum():
    (code,) = examples("docs/ops.md", "# Noise and Adam in one pass.")
    before, step = code.split("# Noise and Adam in one pass.")
    found: dict = {}
    exec(before, found)
    parameters = [*found["conv"].parameters(), *found["linear"].parameters()]
    expected = [torch.zeros_like(p) for p in parameters]
    for image, label in zip(found["images"], found["labels"], strict=True):
        logits = found["linear"](found["conv"](image[None]).relu().flatten(1))
        gradients = torch.autograd.grad(F.cross_entropy(logits, label[None]), parameters)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient * (found["clip"] / norm).clamp(max=1.0)
    for total, other in zip(found["sums"], expected, strict=True):
        assert (total - other).norm() <= 1e-4 * other.norm()
    start = [p.detach().clone() for p in parameters]
    exec("# " + step, found)
    assert all((p != s).all() for p, s in zip(found["params"], start, strict=True))


def test_a_loop_of_ones_own_is_counted_draw_by_draw(capsys):
    (code,) = examples("docs/ops.md", "PoissonBatches")
    found: dict = {}
    exec(code, found)
    assert found["engine"].accountant.history == [(1.0, 0.05, 10)]
    assert float(capsys.readouterr().out) == found["engine"].get_epsilon(1e-5) > 0
    assert [p for p in found["model"].parameters() if not p.isfinite().all()] == []


def test_the_ops_of_the_readme_bound_the_norm():
    (code,) = examples("README.md", "import ops")
    activations, backprops = torch.randn(4, 64, 7, 7), torch.randn(4, 32, 14, 14)
    found: dict = {"activations": activations, "backprops": backprops}
    exec(code, found)
    weight = torch.zeros(64, 32, 4, 4, dtype=torch.float64, requires_grad=True)
    for n in range(4):
        output = F.conv_transpose2d(activations[n : n + 1].double(), weight, stride=2, padding=1)
        (gradient,) = torch.autograd.grad(output, weight, backprops[n : n + 1].double())
        assert 0.999 < found["factors"][n].double() * gradient.norm() <= 1.0


def test_every_setting_is_listed_with_its_default():
    def shown(default: object) -> str:
        return "none" if default is None else "empty" if default == {} else f"`{json.dumps(default)}`"

    tables = re.findall(r"^## \[(\w+)\]\n(.*?)(?=^## )", read("docs/settings.md"), re.DOTALL | re.MULTILINE)
    listed = {table: dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", rows, re.MULTILINE)) for table, rows in tables}
    defaults = Config().to_dict()
    assert listed == {table: {name: shown(v) for name, v in values.items()} for table, values in defaults.items()}


def test_a_folder_that_is_saved_once_is_read_as_before(tmp_path, monkeypatch):
    (code,) = examples("docs/settings.md")
    for i, name in enumerate(("cat", "dog", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 64), (i, 50 * i, 90)).save(tmp_path / "photos" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    folder, file = load_images("photos/", image_size=64, channels=3), load_images("photos.npy")
    assert torch.equal(file.images, folder.images) and torch.equal(file.labels, folder.labels)


def test_what_the_readme_counts_and_lists_is_what_there_is():
    readme = read("README.md")
    assert f"shows {len(SCENARIOS)} cases" in readme
    code = [ROOT / "setup.py", *(ROOT / "dp2vae_fast").rglob("*.py")]
    variables = {name for file in code for name in re.findall(r"DP2VAE_FAST_[A-Z_]+", file.read_text(encoding="utf-8"))}
    assert set(re.findall(r"^\| `(DP2VAE_FAST_[A-Z_]+)` \|", readme, re.MULTILINE)) == variables


def test_every_op_is_listed():
    table = "\n".join(line for line in read("docs/ops.md").splitlines() if line.startswith("|"))
    declared = {name for name, op in OPS.items() if op.__module__.startswith("dp2vae_fast.")}
    assert declared <= set(re.findall(r"`(\w+)`", table))
