"""The clipping of Transformers' Trainer, under the patch."""

from __future__ import annotations

import pytest
import torch
import trainers
from language_model import logged, make_data, make_trainer, train


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_trainer(tmp_path, bf16):
    trainers.assert_same_under_patch(
        lambda: train(tmp_path, max_grad_norm=0.1, bf16=bf16),
        {"gradclip_ext::clip_grad_norm_": trainers.STEPS},
        train(tmp_path, max_grad_norm=0.0, bf16=bf16),
    )


def test_trainer_that_clips_nothing_and_logs_the_norm(tmp_path):
    # It calls with infinity at each step.
    trainers.assert_same_under_patch(
        lambda: train(tmp_path, max_grad_norm=0.0),
        {"gradclip_ext::clip_grad_norm_": trainers.STEPS},
    )


def test_the_logged_norm_is_the_same(tmp_path):
    def norms():
        trainer = make_trainer(tmp_path, max_grad_norm=0.0)
        trainer.train()
        return torch.tensor(logged(trainer, "grad_norm"))

    expected = norms()
    with trainers.patch():
        torch.testing.assert_close(norms(), expected, rtol=trainers.SAME, atol=0.0)
    assert len(expected) == trainers.STEPS and expected.min() > 0.1


def test_trainer_that_accumulates(tmp_path):
    trainers.assert_same_under_patch(
        lambda: train(tmp_path, data=make_data(24), gradient_accumulation_steps=4),
        {"gradclip_ext::clip_grad_norm_": 6},
    )
