"""For the suites of frameworks/: Lightning modules, and a Trainer for them."""

from __future__ import annotations

import lightning
import torch
import trainers
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader


class Module(lightning.LightningModule):
    def __init__(self, **optimizer):
        super().__init__()
        self.model = trainers.make_model()
        self.options = {"lr": 0.05, **optimizer}
        self.losses = []
        self.clipped = []

    def training_step(self, batch, index):
        inputs, targets = batch
        loss = trainers.loss_of(self.model(inputs), targets)
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer):
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.clipped.append(torch.nn.utils.get_total_norm(gradients).item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), **self.options)


class Recorder(Logger):
    """A logger that keeps what it is given, by step."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.steps = {}

    def log_metrics(self, metrics, step):
        self.steps.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *arguments, **options):
        pass


def data(batches=trainers.STEPS):
    return DataLoader(trainers.make_batches(batches), batch_size=None)


def make_trainer(*callbacks, package=lightning, **options):
    return package.Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        },
        callbacks=list(callbacks),
    )


def trained(callback, module=None, batches=trainers.STEPS, **options):
    module = Module() if module is None else module
    trainer = make_trainer(callback, **options)
    trainer.fit(module, data(batches))
    return module, trainer


class Manual(Module):
    """Two optimizers, of which the second steps in every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(trainers.SIZE, 1)

    def training_step(self, batch, index):
        inputs, targets = batch
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(trainers.loss_of(self.model(inputs), targets))
        first.step()
        if index % 2:
            second.zero_grad()
            self.manual_backward(trainers.loss_of(self.other(inputs), targets))
            second.step()

    def on_before_optimizer_step(self, optimizer):
        parameters = optimizer.param_groups[0]["params"]
        gradients = [parameter.grad for parameter in parameters]
        self.clipped.append(torch.nn.utils.get_total_norm(gradients).item())

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.model.parameters(), lr=0.05),
            torch.optim.SGD(self.other.parameters(), lr=0.05),
        ]
