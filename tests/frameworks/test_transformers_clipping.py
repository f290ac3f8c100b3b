"""The callback for Transformers."""

from __future__ import annotations

import json

import pytest
import torch
import trainers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from language_model import logged, make_data, make_language_model, make_trainer, train
from transformers import TrainerCallback, __version__

from gradclip_ext import AutoClip, GradClipper
from gradclip_ext.integrations._versions import TESTED
from gradclip_ext.integrations.transformers import GradClipping


class Watching(TrainerCallback):
    """Reports as reporters do, and looks at the gradients that the optimizer gets."""

    def __init__(self):
        self.logs = []
        self.clipped = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, logs))

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.clipped.append(torch.nn.utils.get_total_norm(gradients).item())


def trained(folder, callback, attach=True, watching=None, resume=None, **options):
    watching = Watching() if watching is None else watching
    callbacks = [watching] if attach else [watching, callback]
    trainer = make_trainer(folder, callbacks=callbacks, **{"max_grad_norm": 0, **options})
    if attach:
        callback.attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watching


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_losses_are_those_of_the_trainers_own_clipping(tmp_path, bf16):
    trainer, watching = trained(tmp_path, GradClipping(0.1), bf16=bf16)
    torch.testing.assert_close(
        torch.tensor(logged(trainer, "loss")),
        torch.tensor(train(tmp_path, max_grad_norm=0.1, bf16=bf16)),
        rtol=trainers.SAME,
        atol=0.0,
    )
    assert watching.clipped == pytest.approx([0.1] * 6, rel=1e-5)


def test_it_clips_natively_once_a_step(tmp_path):
    trainer = make_trainer(tmp_path, max_grad_norm=0, logging_strategy="no")
    GradClipping(0.1).attach(trainer)
    found = trainers.ranges_in(trainer.train)
    assert found["gradclip_ext::grad_norms"] == found["gradclip_ext::scale_"] == trainers.STEPS


def test_a_rule_follows_the_steps(tmp_path):
    callback = GradClipping(AutoClip(percentile=10))
    trainer, _ = trained(tmp_path, callback)
    report = callback.clipper.report()
    assert report.steps == trainers.STEPS and report.clipped_steps > 0
    assert report.total_norm == pytest.approx(logged(trainer, "grad_norm")[-1], rel=1e-6)
    assert "transformer.h.1.mlp.c_fc.weight" in report.names
    assert set(report.names) == {name for name, _ in trainer.model.named_parameters()}


def test_accumulated_gradients_are_clipped_once(tmp_path):
    callback = GradClipping(0.1)
    _, watching = trained(tmp_path, callback, data=make_data(8), gradient_accumulation_steps=4)
    assert callback.clipper.report().steps == 2
    assert watching.clipped == pytest.approx([0.1, 0.1], rel=1e-5)


class TestReporting:
    def test_the_norm_of_each_parameter(self, tmp_path):
        callback = GradClipping(0.1)
        trainer, watching = trained(tmp_path, callback, logging_steps=2)
        reports = {step: logs for step, logs in watching.logs if "gradients/total_norm" in logs}
        assert sorted(reports) == [2, 4, 6]
        assert reports[6] == callback.clipper.report().as_dict()
        assert "gradients/norm/transformer.wte.weight" in reports[2]
        assert reports[2] != reports[4]
        # Beside what the Trainer keeps and prints.
        assert logged(trainer, "gradients/total_norm") == []

    def test_how_much(self, tmp_path):
        callback = GradClipping(0.1, prefix="g/", log="summary")
        _, watching = trained(tmp_path, callback)
        assert len([name for name in watching.logs[1][1] if name.startswith("g/")]) == 6
        _, watching = trained(tmp_path, GradClipping(0.1, log=None))
        assert [logs for _, logs in watching.logs if "gradients/total_norm" in logs] == []

    def test_nothing_is_read_in_other_steps(self, tmp_path, monkeypatch):
        read = []
        monkeypatch.setattr(GradClipper, "report", lambda self: read.append(1))
        trained(tmp_path, GradClipping(0.1), logging_strategy="no")
        assert not read

    def test_by_hand_without_a_trainer(self, tmp_path):
        callback = GradClipping(0.1)
        _, watching = trained(tmp_path, callback, attach=False)
        assert [logs for _, logs in watching.logs if "gradients/total_norm" in logs] == []
        assert callback.metrics() == callback.clipper.report().as_dict()

    def test_attached_twice(self, tmp_path):
        callback = GradClipping(0.1)
        trainer = make_trainer(tmp_path, max_grad_norm=0, callbacks=[callback])
        callback.attach(trainer)
        callback.attach(trainer)
        trainer.train()
        assert callback.clipper.report().steps == trainers.STEPS


SAVING = {"save_strategy": "steps", "save_steps": 3}


class TestCheckpoints:
    def test_resumed_as_if_never_stopped(self, tmp_path):
        whole = GradClipping(AutoClip(percentile=50))
        trainer, _ = trained(tmp_path, whole, **SAVING)
        callback = GradClipping(AutoClip(percentile=50))
        resumed, _ = trained(tmp_path, callback, resume=str(tmp_path / "checkpoint-3"), **SAVING)
        expected, found = whole.clipper.report(), callback.clipper.report()
        assert found.as_dict() == expected.as_dict() and found.steps == trainers.STEPS
        assert callback.clipper.state_dict()["rules"][0]["count"].item() == trainers.STEPS
        assert logged(resumed, "loss") == logged(trainer, "loss")

    def test_it_is_json_although_a_history_holds_nan(self, tmp_path):
        callback = GradClipping(AutoClip())
        trained(tmp_path, callback, **SAVING)
        assert callback.clipper.state_dict()["rules"][0]["history"].isnan().any()
        text = (tmp_path / "checkpoint-6" / "trainer_state.json").read_text()
        state = json.loads(text, parse_constant=pytest.fail)
        assert "GradClipping" in state["stateful_callbacks"]

    def test_a_checkpoint_without_the_callback(self, tmp_path):
        trained(tmp_path, Watching(), attach=False, **SAVING)
        callback = GradClipping(0.1)
        checkpoint = str(tmp_path / "checkpoint-3")
        trained(tmp_path, callback, resume=checkpoint, **SAVING)
        assert callback.clipper.report().steps == 3
        saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
        assert "GradClipping" in saved["stateful_callbacks"]

    def test_of_another_rule(self, tmp_path):
        trained(tmp_path, GradClipping(AutoClip()), **SAVING)
        with pytest.raises(ValueError, match="that of other rules"):
            trained(tmp_path, GradClipping(0.1), resume=str(tmp_path / "checkpoint-3"))

    @pytest.mark.parametrize("attach", [False, True])
    def test_that_would_replace_the_callback(self, tmp_path, attach):
        with pytest.raises(ValueError) as error:
            trained(
                tmp_path,
                GradClipping(0.1),
                attach=attach,
                restore_callback_states_from_checkpoint=True,
            )
        assert str(error.value) == (
            "GradClipping: with restore_callback_states_from_checkpoint=True the Trainer would "
            "replace this callback by one without its settings; leave it False, the state of the "
            "clipper is restored anyway"
        )


def test_a_second_training_goes_on_with_the_same_model(tmp_path):
    callback = GradClipping(0.1)
    trainer, _ = trained(tmp_path, callback)
    trainer.train()
    assert callback.clipper.report().steps == 2 * trainers.STEPS


def test_frozen_parameters(tmp_path):
    model = make_language_model()
    model.transformer.wte.requires_grad_(False)
    callback = GradClipping(0.1)
    _, watching = trained(tmp_path, callback, model=model)
    assert "transformer.wte.weight" not in callback.clipper.report().names
    assert watching.clipped == pytest.approx([0.1] * 6, rel=1e-5)


def test_a_group_without_parameters(tmp_path):
    # The Trainer has one for parameters without weight decay, also where there are none.
    model = make_language_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("attn.c_attn.weight"))
    callback = GradClipping(0.1)
    trainer, watching = trained(tmp_path, callback, model=model)
    assert [] in [group["params"] for group in trainer.optimizer.param_groups]
    assert watching.clipped == pytest.approx([0.1] * 6, rel=1e-5)
    assert callback.clipper.report().names == (
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.1.attn.c_attn.weight",
    )


def test_a_step_that_is_skipped(tmp_path):
    model = make_language_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    callback = GradClipping(1e-3, skip_above=1e-2, max_skips_in_a_row=100)
    trained(tmp_path, callback, model=model, weight_decay=0.1, logging_strategy="no")
    assert callback.clipper.report().skipped_steps == trainers.STEPS
    assert all(map(torch.equal, model.parameters(), before))


def test_a_max_grad_norm_beside_it(tmp_path):
    with pytest.raises(ValueError) as error:
        trained(tmp_path, GradClipping(0.1), max_grad_norm=1.0)
    assert str(error.value) == (
        "GradClipping: TrainingArguments(max_grad_norm=1.0) would clip the gradients once more; "
        "set max_grad_norm=0"
    )


class TestArgumentsOfTheTrainer:
    """Those that cannot be had on this machine, or with this version."""

    @pytest.fixture
    def trainer(self, tmp_path):
        return make_trainer(tmp_path, max_grad_norm=0)

    def refused(self, trainer, **arguments):
        for name, value in arguments.items():
            setattr(trainer.args, name, value)
        with pytest.raises(ValueError) as error:
            GradClipping(0.1).on_train_begin(trainer.args, trainer.state, trainer.control)
        return str(error.value)

    @pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
    def test_gradients_that_only_its_own_clipping_sees(self, trainer, monkeypatch, kind):
        shared = PartialState._shared_state
        monkeypatch.setitem(shared, "distributed_type", DistributedType[kind])
        monkeypatch.setitem(shared, "is_fsdp2", False)
        assert self.refused(trainer) == (
            f"GradClipping: {kind} keeps gradients where only its own clipping sees them; set "
            "max_grad_norm instead of adding this callback"
        )

    def test_a_version_that_leaves_float16_gradients_scaled(self, trainer, monkeypatch):
        monkeypatch.setitem(TESTED, "transformers", ("99.0", "99.1"))
        assert self.refused(trainer, fp16=True) == (
            f"GradClipping: with max_grad_norm=0 the Trainer of transformers {__version__} does "
            "not unscale float16 gradients; use bf16=True or a later version"
        )


def test_bad_arguments():
    with pytest.raises(TypeError) as error:
        GradClipping(limit=1.0)
    assert str(error.value) == "GradClipping: got an unexpected keyword argument 'limit'"
