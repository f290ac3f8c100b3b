"""The callback for Lightning."""

from __future__ import annotations

import pytest
import pytorch_lightning
import torch
import trainers
from lightning.pytorch.plugins import MixedPrecision
from lightning_model import Manual, Module, Recorder, data, make_trainer, trained
from torch import nn

from gradclip_ext import AutoClip, GradClipper
from gradclip_ext.integrations.lightning import GradClipping
from gradclip_ext.integrations.pytorch_lightning import GradClipping as OtherGradClipping


def losses_with_gradient_clip_val(**options):
    module = Module()
    make_trainer(**options).fit(module, data())
    return module.losses


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "callback, theirs",
    [
        (lambda: GradClipping(0.5), {"gradient_clip_val": 0.5}),
        (
            lambda: GradClipping(clip_value=0.01),
            {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        ),
    ],
    ids=["norm", "value"],
)
def test_losses_are_those_of_the_trainers_own_clipping(callback, theirs, precision):
    module, _ = trained(callback(), precision=precision)
    torch.testing.assert_close(
        torch.tensor(module.losses),
        torch.tensor(losses_with_gradient_clip_val(precision=precision, **theirs)),
        rtol=trainers.SAME,
        atol=0.0,
    )


def test_it_clips_natively_once_a_step():
    class Silent(Module):
        def on_before_optimizer_step(self, optimizer):
            pass

    found = trainers.ranges_in(lambda: trained(GradClipping(0.5), Silent()))
    assert found == dict.fromkeys(
        ["gradclip_ext::grad_norms", "gradclip_ext::scale_"], trainers.STEPS
    )


def test_a_rule_follows_the_steps():
    callback = GradClipping(AutoClip(percentile=50))
    module, _ = trained(callback)
    (clipper,) = callback.clippers
    report = clipper.report()
    assert report.steps == trainers.STEPS and report.clipped_steps > 0
    assert report.names == tuple(name for name, _ in module.named_parameters())
    by_hand = GradClipper(make := Module(), AutoClip(percentile=50))
    optimizer = make.configure_optimizers()
    for inputs, targets in trainers.make_batches():
        optimizer.zero_grad()
        trainers.loss_of(make.model(inputs), targets).backward()
        by_hand.clip_()
        optimizer.step()
    assert by_hand.report().as_dict() == report.as_dict()


def test_accumulated_gradients_are_clipped_once():
    callback = GradClipping(0.5)
    module, _ = trained(callback, batches=8, accumulate_grad_batches=4)
    assert callback.clippers[0].report().steps == 2
    assert module.clipped == pytest.approx([0.5, 0.5], rel=1e-5)


class TestLogging:
    def logged(self, callback, **options):
        logger = Recorder()
        trained(callback, logger=logger, **options)
        return logger.steps

    def test_the_norm_of_each_parameter(self):
        callback = GradClipping(0.5)
        logged = self.logged(callback, log_every_n_steps=2)
        assert sorted(logged) == [1, 3, 5]
        last = callback.clippers[0].report().as_dict()
        assert "gradients/norm/model.2.weight" in last
        assert {name: logged[5][name] for name in last} == pytest.approx(last)
        assert logged[1]["gradients/total_norm"] != logged[3]["gradients/total_norm"]

    def test_steps_that_accumulate(self):
        options = {"batches": 8, "accumulate_grad_batches": 4, "log_every_n_steps": 1}
        logged = self.logged(GradClipping(0.5), **options)
        assert sorted(logged) == [0, 1]

    def test_once_a_step_while_gradients_accumulate(self, monkeypatch):
        read, report = [], GradClipper.report
        monkeypatch.setattr(GradClipper, "report", lambda self: read.append(1) or report(self))
        options = {"batches": 8, "accumulate_grad_batches": 4, "log_every_n_steps": 1}
        trained(GradClipping(0.5), **options)
        assert len(read) == 2

    @pytest.mark.parametrize("log, count", [("each", 12), ("summary", 6), (None, 0)])
    def test_how_much(self, log, count):
        logged = self.logged(GradClipping(0.5, prefix="g/", log=log), log_every_n_steps=1)
        names = [name for name in logged.get(0, {}) if name.startswith("g/")]
        assert len(names) == count

    def test_nothing_is_read_in_other_steps(self, monkeypatch):
        read = []
        monkeypatch.setattr(GradClipper, "report", lambda self: read.append(1))
        trained(GradClipping(0.5), log_every_n_steps=100)
        assert not read


def test_manual_optimization_with_several_optimizers():
    callback = GradClipping(0.5)
    logger = Recorder()
    module, _ = trained(callback, Manual(), logger=logger, log_every_n_steps=1)
    assert [clipper.report().steps for clipper in callback.clippers] == [6, 3]
    assert module.clipped == pytest.approx([0.5] * 9, rel=1e-5)
    first, second, *_ = logger.steps.values()
    assert "gradients/optimizer[0]/norm/model.0.weight" in first
    assert "gradients/optimizer[1]/total_norm" not in first
    assert second["gradients/optimizer[1]/norm/other.weight"] > 0.0


def test_each_optimizer_has_its_own_rule():
    callback = GradClipping(AutoClip())
    trained(callback, Manual())
    counts = [clipper.state_dict()["rules"][0]["count"].item() for clipper in callback.clippers]
    assert counts == [6, 3]


class TestScaler:
    def plugin(self, scale=2.0**10):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return MixedPrecision("16-mixed", "cpu", scaler=scaler)

    def test_gradients_are_unscaled_before(self):
        callback = GradClipping(0.5)
        module, _ = trained(callback, plugins=self.plugin())
        theirs = losses_with_gradient_clip_val(plugins=self.plugin(), gradient_clip_val=0.5)
        assert module.losses == pytest.approx(theirs, rel=2e-6)
        assert module.clipped == pytest.approx([0.5] * 6, rel=1e-5)
        assert callback.clippers[0].report().total_norm < 100.0

    def test_an_overflow_is_skipped_by_the_scaler(self):
        callback = GradClipping(AutoClip())
        plugin = self.plugin(2.0**40)
        trained(callback, plugins=plugin)
        assert callback.clippers[0].report().nonfinite_steps == trainers.STEPS
        assert plugin.scaler.get_scale() == 2.0 ** (40 - trainers.STEPS)
        assert callback.clippers[0].state_dict()["rules"][0]["count"].item() == 0

    def test_a_fused_optimizer_is_refused(self):
        with pytest.raises(RuntimeError) as error:
            trained(GradClipping(0.5), Module(fused=True), plugins=self.plugin())
        assert str(error.value) == (
            "GradClipping: the gradients are still scaled, because SGD with fused=True unscales "
            "them in its step; use fused=False, or bf16-mixed, which needs no scaler"
        )

    def test_a_fused_optimizer_without_scaler_is_clipped(self):
        module, _ = trained(GradClipping(0.5), Module(fused=True), precision="bf16-mixed")
        assert module.clipped == pytest.approx([0.5] * 6, rel=1e-5)


class Spike(Module):
    def training_step(self, batch, index):
        self.before = [parameter.detach().clone() for parameter in self.parameters()]
        loss = super().training_step(batch, index)
        return loss * 1e6 if index == trainers.STEPS - 1 else loss


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_skipped(fused):
    callback = GradClipping(10.0, skip_above=1e3)
    module = Spike(fused=fused, momentum=0.9, weight_decay=0.1)
    trained(callback, module)
    report = callback.clippers[0].report()
    assert (report.steps, report.skipped_steps) == (trainers.STEPS, 1)
    assert all(map(torch.equal, module.parameters(), module.before))


def test_gradients_that_become_zero_are_stepped():
    class NotFinite(Spike):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss * torch.inf if index == trainers.STEPS - 1 else loss

    callback = GradClipping(10.0, nonfinite="zero", skip_above=1e9)
    module = NotFinite(weight_decay=0.1)
    trained(callback, module)
    assert callback.clippers[0].report().nonfinite_steps == 1
    for parameter, before in zip(module.parameters(), module.before, strict=True):
        torch.testing.assert_close(parameter.detach(), before * (1 - 0.05 * 0.1))


def test_a_batch_without_loss():
    class Sometimes(Module):
        def training_step(self, batch, index):
            return None if index == 2 else super().training_step(batch, index)

        def on_before_optimizer_step(self, optimizer):
            pass

    callback = GradClipping(AutoClip())
    trained(callback, Sometimes())
    assert callback.clippers[0].report().steps == trainers.STEPS - 1


class TestParametersThatChange:
    def test_frozen(self):
        module = Module()
        module.model[0].requires_grad_(False)
        callback = GradClipping(0.5)
        trained(callback, module)
        report = callback.clippers[0].report()
        norms = dict(zip(report.names, report.norms, strict=True))
        assert norms["model.0.weight"] == 0.0 and norms["model.3.weight"] > 0.0
        assert module.clipped == pytest.approx([0.5] * 6, rel=1e-5)

    def test_unfrozen_and_added_to_the_optimizer(self):
        class Finetuning(Module):
            def on_train_batch_start(self, batch, index):
                if index == 3:
                    self.model[0].requires_grad_(True)
                    added = {"params": list(self.model[0].parameters())}
                    self.trainer.optimizers[0].add_param_group(added)

            def configure_optimizers(self):
                self.model[0].requires_grad_(False)
                rest = [p for p in self.parameters() if p.requires_grad]
                return torch.optim.SGD(rest, lr=0.05)

        callback = GradClipping(0.5)
        module, _ = trained(callback, Finetuning())
        report = callback.clippers[0].report()
        assert report.names[-2:] == ("model.0.weight", "model.0.bias")
        assert min(report.norms) > 0.0
        assert module.clipped == pytest.approx([0.5] * 6, rel=1e-5)

    def test_made_during_the_training(self):
        class Growing(Module):
            def on_train_batch_start(self, batch, index):
                if index == 3:
                    self.model.append(nn.Linear(1, 1))
                    added = {"params": list(self.model[-1].parameters())}
                    self.trainer.optimizers[0].add_param_group(added)

        callback = GradClipping(0.5)
        module, _ = trained(callback, Growing())
        report = callback.clippers[0].report()
        assert report.names[-2:] == ("model.4.weight", "model.4.bias")
        assert module.clipped == pytest.approx([0.5] * 6, rel=1e-5)

    def test_groups_that_are_left_out(self):
        class Groups(Module):
            def configure_optimizers(self):
                first, *rest = self.model
                groups = [
                    {"params": first.parameters(), "clip_grad": False},
                    {"params": [p for part in rest for p in part.parameters()]},
                ]
                return torch.optim.SGD(groups, lr=0.001)

        callback = GradClipping(0.5)
        trained(callback, Groups())
        assert callback.clippers[0].report().names == (
            "model.2.weight",
            "model.2.bias",
            "model.3.weight",
            "model.3.bias",
        )


def test_two_of_them_are_refused_by_lightning():
    with pytest.raises(RuntimeError, match="must be unique"):
        make_trainer(GradClipping(0.5), GradClipping(0.1))


def test_a_gradient_clip_val_beside_it():
    with pytest.raises(ValueError) as error:
        trained(GradClipping(0.5), gradient_clip_val=1.0)
    assert str(error.value) == (
        "GradClipping: Trainer(gradient_clip_val=1.0) would clip the gradients once more; leave it "
        "out"
    )


@pytest.mark.parametrize("value", [None, 0, 0.0])
def test_a_gradient_clip_val_that_does_nothing(value):
    module, _ = trained(GradClipping(0.5), gradient_clip_val=value)
    assert module.clipped == pytest.approx([0.5] * 6, rel=1e-5)


def test_a_strategy_that_clips_by_itself():
    trainer = make_trainer(callback := GradClipping(0.5))
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})
    with pytest.raises(ValueError) as error:
        callback.on_fit_start(trainer, Module())
    assert str(error.value) == (
        "GradClipping: FSDPStrategy keeps gradients where only its own clipping sees them; pass "
        "gradient_clip_val to the Trainer instead of this callback"
    )


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"limit": 1.0}, TypeError, "GradClipping: got an unexpected keyword argument 'limit'"),
        (
            {"max_norm": 1.0, "log": "all"},
            ValueError,
            "GradClipping: log has to be one of ('each', 'summary', None), found 'all'",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error) as raised:
        GradClipping(**arguments)
    assert str(raised.value) == message


def test_a_rule_that_is_none_stops_the_training_before_its_first_step():
    module = Module()
    with pytest.raises(ValueError, match="there is nothing to do"):
        trained(GradClipping(), module)
    assert module.losses == []


def test_under_its_other_name():
    class Other(pytorch_lightning.LightningModule):
        __init__ = Module.__init__

    other = type("Other", (pytorch_lightning.LightningModule,), {})
    for name in ("training_step", "on_before_optimizer_step", "configure_optimizers"):
        setattr(other, name, vars(Module)[name])
    module = other()
    module.model, module.options, module.losses, module.clipped = (
        trainers.make_model(),
        {"lr": 0.05},
        [],
        [],
    )
    callback = OtherGradClipping(0.5)
    make_trainer(callback, package=pytorch_lightning).fit(module, data())
    assert module.clipped == pytest.approx([0.5] * 6, rel=1e-5)
