"""The clipping of Transformers' Trainer, under the patch."""

from __future__ import annotations

import pytest
import torch
import trainers
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


def make_language_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(**sizes, **tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )


def make_data(count=trainers.STEPS):
    tokens = torch.randint(0, 17, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def make_trainer(folder, data=None, model=None, callbacks=None, **options):
    arguments = TrainingArguments(
        folder,
        **{
            "use_cpu": True,
            "per_device_train_batch_size": 1,
            "num_train_epochs": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        },
    )
    model = make_language_model() if model is None else model
    return Trainer(model, arguments, train_dataset=data or make_data(), callbacks=callbacks)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def train(folder, **options):
    trainer = make_trainer(folder, **options)
    trainer.train()
    return logged(trainer, "loss")


@pytest.fixture(autouse=True)
def quiet():
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)


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
