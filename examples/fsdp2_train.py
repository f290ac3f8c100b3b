"""Train a transformer that FSDP2 has split over several ranks, clipped by one norm for all of them.

A small character-level transformer learns Python's help, which comes with Python. Each rank sees
its own part of a batch and holds its own part of every parameter. The learning rate is so high that
training needs clipping. Three runs start from the same network and see the same batches:

    torch           torch.nn.utils.clip_grad_norm_
    gradclip_ext    gradclip_ext.clip_grad_norm_, the same call
    GradClipper     gradclip_ext.GradClipper, which counts and reports as well

They take the same steps, so their losses agree but for rounding, and within a run all ranks get the
same norm, to the bit. On the CPU by gloo, on GPUs by nccl, with the same command:

    torchrun --nproc-per-node 2 examples/fsdp2_train.py
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from char_rnn_model import VOCABULARY, encode, read_text
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

import gradclip_ext

CHARACTERS = 20000
SEQUENCE_LENGTH = 32
BATCH_SIZE = 16  # Of a rank.
WIDTH = 64
LEARNING_RATE = 0.5
MAX_NORM = 0.5
WAYS = ("torch", "gradclip_ext", "GradClipper")

# Clips the gradients of a model in place, and returns their norm before that.
Clip = Callable[[nn.Module], Tensor]


@dataclass
class Run:
    """What a training run gave.

    Attributes:
        name: the way of clipping.
        losses: of each step, the mean over all ranks.
        norms: for each rank the norms that it got.
        clipped_steps: what the clipper has counted, None without one.
    """

    name: str
    losses: list[float] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=list)
    clipped_steps: int | None = None


class Transformer(nn.Module):
    """Predicts the next character at each place of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(VOCABULARY), WIDTH)
        self.places = nn.Embedding(SEQUENCE_LENGTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, len(VOCABULARY))

    def forward(self, text: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, from the inputs and the characters after them: (batch, sequence)."""
        places = torch.arange(text.shape[1], device=text.device)
        hidden = self.characters(text) + self.places(places)
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1], device=text.device)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


def sharded_model(mesh: DeviceMesh, seed: int) -> nn.Module:
    """The same initial weights on all ranks, of which each then keeps its part."""
    torch.manual_seed(seed)
    model = Transformer().to(mesh.device_type)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def batches(text: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endlessly yields this rank's inputs and targets, both of shape (batch, sequence)."""
    generator = torch.Generator().manual_seed(1000 * seed + distributed.get_rank())
    offsets = torch.arange(SEQUENCE_LENGTH + 1)
    while True:
        starts = torch.randint(len(text) - SEQUENCE_LENGTH, (BATCH_SIZE, 1), generator=generator)
        rows = text[starts + offsets]
        yield rows[:, :-1], rows[:, 1:]


def train(name: str, kind: str, steps: int, seed: int) -> Run:
    """Trains a new network on devices of a kind, clipped in one of the ways."""
    mesh = init_device_mesh(kind, (distributed.get_world_size(),))
    model = sharded_model(mesh, seed)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
    clipper = gradclip_ext.GradClipper(model, MAX_NORM)
    ways: dict[str, Clip] = {
        "torch": lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM),
        "gradclip_ext": lambda model: gradclip_ext.clip_grad_norm_(model.parameters(), MAX_NORM),
        "GradClipper": lambda _: clipper.clip_(),
    }
    source = batches(encode(read_text(CHARACTERS)), seed)
    run, norms = Run(name), []
    for _ in range(steps):
        inputs, targets = (part.to(mesh.device_type) for part in next(source))
        optimizer.zero_grad()
        loss = model(inputs, targets)
        loss.backward()
        norm = ways[name](model)
        optimizer.step()

        # Torch's norm of DTensors is a DTensor, and so is that of its drop-in; a clipper's is not.
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        norms.append(norm.item())
        mean = loss.detach()
        distributed.all_reduce(mean)
        run.losses.append(mean.item() / distributed.get_world_size())
    run.norms = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(run.norms, norms)
    if name == "GradClipper":
        # Needs no other rank, so that one alone may ask for it.
        run.clipped_steps = clipper.report().clipped_steps
    return run


def summary(runs: Sequence[Run]) -> str:
    """The table of the runs."""
    rows = [("", "first loss", "last loss", "first norm", "last norm", "on all ranks", "clipped")]
    for run in runs:
        own = run.norms[0]
        agree = all(norms == own for norms in run.norms)
        rows.append(
            (
                run.name,
                f"{run.losses[0]:.6f}",
                f"{run.losses[-1]:.6f}",
                f"{own[0]:.6f}",
                f"{own[-1]:.6f}",
                "the same" if agree else "different",
                "" if run.clipped_steps is None else f"{run.clipped_steps} of {len(own)}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="per run (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where the runs are saved as JSON")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps has to be at least 1")
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it by torchrun --nproc-per-node 2 examples/fsdp2_train.py")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        runs = [train(name, kind, options.steps, options.seed) for name in WAYS]
        if distributed.get_rank() == 0:
            print(summary(runs))
            if options.output is not None:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps([asdict(run) for run in runs]))
        # torchrun stops the other ranks when one ends with an error.
        distributed.barrier()
    finally:
        # Modules of FSDP2 hold one another and the group, whose threads end with it.
        gc.collect()
        distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
