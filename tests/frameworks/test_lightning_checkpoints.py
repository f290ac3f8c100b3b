"""The state of the callback for Lightning: saved, resumed, and kept for a second training."""

from __future__ import annotations

import pytest
import torch
import trainers
from lightning_model import Manual, Module, data, make_trainer, trained

from gradclip_ext import AutoClip
from gradclip_ext.integrations.lightning import GradClipping


class TestCheckpoints:
    def saved(self, tmp_path):
        callback = GradClipping(AutoClip(percentile=50))
        _, trainer = trained(callback, batches=3)
        path = tmp_path / "last.ckpt"
        trainer.save_checkpoint(path)
        return path, callback

    def test_resumed_as_if_never_stopped(self, tmp_path):
        whole = GradClipping(AutoClip(percentile=50))
        module, trainer = Module(), make_trainer(whole, max_epochs=2)
        trainer.fit(module, data(3))
        path, _ = self.saved(tmp_path)
        callback, resumed = GradClipping(AutoClip(percentile=50)), Module()
        make_trainer(callback, max_epochs=2).fit(resumed, data(3), ckpt_path=path)
        expected, found = whole.clippers[0].report(), callback.clippers[0].report()
        assert found.as_dict() == expected.as_dict() and found.steps == 6
        assert resumed.losses == module.losses[3:]

    def test_saved_before_the_first_step_of_a_resumed_training(self, tmp_path):
        path, callback = self.saved(tmp_path)
        state = torch.load(path, weights_only=True)["callbacks"]["GradClipping"]
        again = GradClipping(AutoClip(percentile=50))
        again.load_state_dict(state)
        assert again.state_dict() is not state
        (found,), (expected,) = again.state_dict()["clippers"], callback.state_dict()["clippers"]
        assert found["steps"] == expected["steps"] == 3

    def test_a_checkpoint_without_the_callback(self, tmp_path):
        module, trainer = Module(), make_trainer()
        trainer.fit(module, data(3))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        callback = GradClipping(0.5)
        make_trainer(callback, max_epochs=2).fit(
            Module(), data(3), ckpt_path=tmp_path / "last.ckpt"
        )
        assert callback.clippers[0].report().steps == 3

    def test_of_another_number_of_optimizers(self, tmp_path):
        path, _ = self.saved(tmp_path)
        state = torch.load(path, weights_only=True)["callbacks"]["GradClipping"]
        callback = GradClipping(AutoClip(percentile=50))
        callback.load_state_dict(state)
        with pytest.raises(ValueError) as error:
            trained(callback, Manual())
        assert str(error.value) == ("GradClipping: the state is that of 1 optimizers, expected 2")

    def test_of_another_rule(self, tmp_path):
        path, _ = self.saved(tmp_path)
        with pytest.raises(ValueError, match="that of other rules"):
            trainer = make_trainer(GradClipping(1.0), max_epochs=2)
            trainer.fit(Module(), data(3), ckpt_path=path)


def test_a_training_that_goes_on_keeps_its_clippers():
    callback = GradClipping(AutoClip())
    module, trainer = trained(callback)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data())
    assert callback.clippers[0].report().steps == 2 * trainers.STEPS


def test_other_parameters_of_the_same_model_start_afresh():
    class Part(Module):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    module, callback = Part(), GradClipping(AutoClip())
    module.model[0].requires_grad_(False)
    trained(callback, module)
    module.model[0].requires_grad_(True)
    trained(callback, module)
    assert callback.clippers[0].report().steps == trainers.STEPS
    assert len(callback.clippers[0].report().names) == 6


def test_a_checkpoint_is_that_of_the_new_model_after_another_was_trained(tmp_path):
    callback = GradClipping(AutoClip())
    _, trainer = trained(callback, batches=3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trained(callback, Manual())
    resumed = make_trainer(callback, max_epochs=2)
    resumed.fit(Module(), data(3), ckpt_path=tmp_path / "last.ckpt")
    assert [clipper.report().steps for clipper in callback.clippers] == [6]


def test_another_model_starts_afresh():
    callback = GradClipping(AutoClip())
    trained(callback)
    trained(callback, Manual())
    assert [clipper.report().steps for clipper in callback.clippers] == [6, 3]
