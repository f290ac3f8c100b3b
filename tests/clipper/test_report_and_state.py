"""What the clipper reports, and that it resumes from its state."""

from __future__ import annotations

import pickle

import pytest
import reference as ref
import torch
from models import gradients_of, make_model, set_gradients
from torch import nn

from gradclip_ext import AdaGC, AutoClip, GradClipper, ZClip


class TestReportAndState:
    def test_report(self):
        model = make_model()
        clipper = GradClipper(model, 1.0)
        with pytest.raises(RuntimeError) as error:
            clipper.report()
        assert "before the first clip_()" in str(error.value)
        norms = [ref.reference_norm([gradient], 2.0) for gradient in gradients_of(model)]
        total = ref.reference_norm(gradients_of(model), 2.0)
        clipper.clip_()
        set_gradients(model, 1, 1e-3)
        clipper.clip_()
        set_gradients(model)
        clipper.clip_()
        report = clipper.report()
        assert report.names == ("0.weight", "0.bias", "2.weight")
        assert report.norms == pytest.approx(norms, rel=1e-6)
        assert report.total_norm == pytest.approx(total, rel=1e-6)
        assert report.coefficient == pytest.approx(1.0 / total, rel=1e-5)
        assert report.limits == (1.0,)
        assert (report.steps, report.clipped_steps, report.nonfinite_steps) == (3, 2, 0)
        numbers = report.as_dict()
        assert numbers["gradients/norm/0.bias"] == report.norms[1]
        assert numbers["gradients/limit"] == 1.0
        assert numbers["gradients/clipped_share"] == pytest.approx(2 / 3)
        assert all(type(value) is float for value in numbers.values())

    @pytest.mark.parametrize(
        "rule",
        [lambda: 0.5, AutoClip, lambda: ZClip(warmup_steps=2), lambda: AdaGC(warmup_steps=2)],
        ids=["number", "AutoClip", "ZClip", "AdaGC"],
    )
    @pytest.mark.parametrize("way", ["state_dict", "pickle"])
    def test_resumes(self, rule, way):
        def step(clipper, model, seed):
            set_gradients(model, seed, 1.0 + seed % 3)
            clipper.clip_()
            return [gradient.clone() for gradient in gradients_of(model)]

        model = make_model()
        clipper = GradClipper(model, rule())
        for seed in range(5):
            step(clipper, model, seed)
        if way == "pickle":
            resumed, resumed_model = pickle.loads(pickle.dumps((clipper, model)))
        else:
            resumed_model = make_model()
            resumed = GradClipper(resumed_model, rule())
            # As a checkpoint on a disk.
            resumed.load_state_dict(pickle.loads(pickle.dumps(clipper.state_dict())))
        for seed in range(5, 9):
            expected = step(clipper, model, seed)
            found = step(resumed, resumed_model, seed)
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other)
        assert resumed.report() == clipper.report()

    def test_state_of_another_model_or_rule(self):
        clipper = GradClipper(make_model(), AutoClip())
        clipper.clip_()
        state = clipper.state_dict()
        other = GradClipper(nn.Linear(2, 2), AutoClip())
        with pytest.raises(ValueError, match="another model: expected 2 parameters, found 3"):
            other.load_state_dict(state)
        with pytest.raises(ValueError, match="other rules: expected float, found AutoClip"):
            GradClipper(make_model(), 1.0).load_state_dict(state)
        with pytest.raises(ValueError, match="keys"):
            clipper.load_state_dict({"steps": 1})
        assert clipper.state_dict()["steps"] == 1
