"""No rule needs a device sync: nothing that it computes with is read on the host."""

from __future__ import annotations

import pytest
import torch
from rules import by_rule, feed, limits_of, random_norms, with_nonfinite
from torch._subclasses.fake_tensor import FakeTensorMode

from gradclip_ext.thresholds import AGC, adaptive_clip_grad_

pytestmark = pytest.mark.cpu_only


class TestNoDeviceSync:
    @by_rule
    def test_nothing_is_read_in_python(self, make, monkeypatch):
        rule = make()
        rows = [
            (torch.linalg.vector_norm(norms), norms)
            for norms in torch.tensor(
                with_nonfinite(random_norms(20))[0], dtype=torch.float64
            ).unbind()
        ]

        def refuse(*_):
            raise AssertionError("a number was read on the host")

        with monkeypatch.context() as patch:
            names = ("item", "tolist", "numpy", "cpu", "__array__")
            names += ("__bool__", "__float__", "__int__", "__index__")
            for name in names:
                patch.setattr(torch.Tensor, name, refuse)
            for total, norms in rows:
                rule.limits(total, norms)

    @by_rule
    def test_runs_where_there_are_no_numbers_to_read(self, make):
        # A fake tensor on a GPU has a device but no values: reading one raises, and so does
        # combining it with a tensor on another device.
        rule = make()
        with FakeTensorMode():
            norms = torch.empty(3, dtype=torch.float64, device="cuda")
            total = torch.empty((), dtype=torch.float64, device="cuda")
            for _ in range(12):
                limits = rule.limits(total, norms)
                assert limits.device.type == "cuda"
                assert limits.shape == ((3,) if rule.per_parameter else ())
                state = rule.state_dict()
                tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
                assert all(tensor.device.type == "cuda" for tensor in tensors)
            with pytest.raises(Exception, match="local_scalar_dense"):
                total.item()

    def test_agc_runs_where_there_are_no_numbers_to_read(self):
        with FakeTensorMode():
            for shape in ((), (5,), (4, 5), (4, 3, 2, 2)):
                parameter = torch.empty(shape, device="cuda", requires_grad=True)
                parameter.grad = torch.empty(shape, device="cuda")
                adaptive_clip_grad_(parameter)
                AGC().clip_([("weight", parameter)])

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    @by_rule
    def test_torch_sees_no_synchronization(self, make):
        rows, _ = with_nonfinite(random_norms(150))
        on_host, on_device = make(), make()
        expected = feed(on_host, rows)
        norms = torch.tensor(rows, dtype=torch.float64, device="cuda")
        first, *others = norms.unbind()
        # Copies the state to the GPU.
        found = [on_device.limits(torch.linalg.vector_norm(first), first)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for row in others:
                found.append(on_device.limits(torch.linalg.vector_norm(row), row))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for mine, other in zip(found, expected, strict=True):
            assert mine.tolist() == pytest.approx(other, rel=1e-10)

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    @by_rule
    def test_state_follows_the_norms_to_another_device(self, make):
        rows = random_norms(30)
        rule, expected = make(), feed(make(), rows)
        found = feed(rule, rows[:12])
        found += [limits_of(rule, row, "cuda").tolist() for row in rows[12:]]
        for mine, other in zip(found, expected, strict=True):
            assert mine == pytest.approx(other, rel=1e-10)
