"""For the suites of frameworks/: a tiny language model, and Transformers' Trainer for it."""

from __future__ import annotations

import torch
import trainers
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
