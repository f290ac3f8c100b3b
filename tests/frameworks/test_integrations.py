"""What holds for the modules of all frameworks."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import suites
import torch
import trainers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from gradclip_ext.integrations._clipping import Clippers
from gradclip_ext.integrations._versions import TESTED, warn_if_untested

REQUIREMENTS = Path(__file__).parent / "requirements.txt"
ROOT = suites.TESTS.parent
FRAMEWORKS = ("accelerate", "lightning", "pytorch_lightning", "timm", "transformers")


def test_importing_the_package_imports_no_framework():
    code = (
        "import sys, gradclip_ext, gradclip_ext.integrations\n"
        f"print(sorted(set(sys.modules) & {set(FRAMEWORKS)}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_a_module_imports_its_own_framework_only():
    code = (
        "import sys, gradclip_ext.integrations.accelerate\n"
        f"print(sorted(set(sys.modules) & {set(FRAMEWORKS)}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("['accelerate']\n", "")


class TestVersions:
    @pytest.fixture
    def tested(self, monkeypatch):
        monkeypatch.setitem(TESTED, "accelerate", ("1.9", "1.15"))

    @pytest.mark.parametrize("found", ["1.9", "1.9.0", "1.10.2", "1.15.7", "1.15.0.dev0"])
    def test_inside(self, tested, found):
        with warnings.catch_warnings(action="error"):
            warn_if_untested("module", "accelerate", found)

    @pytest.mark.parametrize("found", ["1.8.9", "0.34.2", "1.16.0", "2.0.0", "1.100"])
    def test_outside(self, tested, found):
        with pytest.warns(UserWarning) as caught:
            warn_if_untested("gradclip_ext.integrations.accelerate", "accelerate", found)
        assert [str(warning.message) for warning in caught] == [
            "gradclip_ext.integrations.accelerate: expected accelerate 1.9 to 1.15, with which it "
            f"was tested, found {found}. It relies on when the framework calls it, which may have "
            "changed: see that the report counts every step, or install a version that was tested"
        ]

    def test_it_names_the_line_of_the_import(self, tmp_path):
        (tmp_path / "train.py").write_text(
            "import accelerate\n"
            "accelerate.__version__ = '99.1'\n"
            "import gradclip_ext.integrations.accelerate as first\n"
            "import gradclip_ext.integrations.accelerate as second\n"
            "print(first.GradClipping.__name__)\n"
        )
        result = subprocess.run(
            [sys.executable, "train.py"], capture_output=True, text=True, cwd=tmp_path
        )
        assert result.stdout == "GradClipping\n"
        assert result.stderr.count("found 99.1") == 1
        assert f"{tmp_path}/train.py:3: UserWarning: " in result.stderr

    def test_what_is_installed_was_tested(self):
        pinned = dict(re.findall(r"^(\S+)==(\S+)$", REQUIREMENTS.read_text(), re.MULTILINE))
        for name in TESTED:
            assert importlib.metadata.version(name) == pinned[name]
            with warnings.catch_warnings(action="error"):
                warn_if_untested("module", name, pinned[name])

    def test_the_page_shows_them(self):
        page = (ROOT / "docs/frameworks/README.md").read_text(encoding="utf-8")
        rows = dict(re.findall(r"^\| `([\w-]+)` \| ([\d. to]+?) \|", page, re.MULTILINE))
        for name, (first, last) in TESTED.items():
            assert rows[name] == (first if first == last else f"{first} to {last}")


@pytest.fixture
def one_rank():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_flat_shards_are_refused(one_rank):
    model = FullyShardedDataParallel(
        trainers.make_model(), device_id=torch.device("cpu"), use_orig_params=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError) as error:
        Clippers("GradClipping", 1.0, {}, "gradients/", "each").start(model, [optimizer])
    assert str(error.value) == (
        "GradClipping: the gradients of FullyShardedDataParallel are pieces of a flat one, of "
        "which only its own clip_grad_norm_ knows the norm; use FSDP2, torch's fully_shard"
    )


def test_a_rank_without_gradients_takes_part(one_rank):
    model = trainers.make_model()
    clippers = Clippers("GradClipping", 1.0, {}, "gradients/", "each")
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    clippers.start(model, [plain])
    assert clippers.clip_(plain) is None
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    sharded = torch.optim.SGD(model.parameters(), lr=0.1)
    clippers.start(model, [sharded])
    assert clippers.clip_(sharded).item() == 0.0


def test_an_optimizer_that_is_made_later():
    model = trainers.make_model()
    first, *rest = model
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    clippers = Clippers("GradClipping", 1e-3, {}, "gradients/", "each")
    clippers.start(model, [optimizer])
    later = torch.optim.SGD([p for part in rest for p in part.parameters()], lr=0.1)
    model(torch.ones(1, trainers.SIZE)).sum().backward()
    clippers.clip_(later)
    assert first.weight.grad.norm() > 1e-3
    clippers.clip_(optimizer)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in part.parameters()]) for part in model]
    assert norms[0].item() == pytest.approx(1e-3, rel=1e-3)
    metrics = clippers.metrics()
    assert metrics["gradients/optimizer[1]/norm/3.weight"] > 0.0


def test_a_state_that_does_not_fit_changes_nothing():
    model = trainers.make_model()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[0], model[3])]
    clippers = Clippers("GradClipping", 1.0, {}, "gradients/", "each")
    clippers.start(model, optimizers)
    state = clippers.state_dict()
    good, bad = ({**one, "steps": 7} for one in state["clippers"])
    bad["names"] = ["other"]
    with pytest.raises(ValueError, match="another model"):
        clippers.load_state_dict({"clippers": [good, bad]})
    assert clippers.state_dict() == state
