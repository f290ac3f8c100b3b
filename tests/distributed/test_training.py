"""A small transformer under FSDP2 and tensor parallelism: the losses of torch's clipping."""

from __future__ import annotations

from typing import Any

import mixes
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import gradclip_ext

STEPS = 10
WIDTH, HEADS, LENGTH, VOCABULARY = 16, 2, 6, 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.second_norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        shape = (*x.shape[:-1], -1, WIDTH // HEADS)
        heads = [part(y).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value)]
        attended = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second_norm(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(part: int) -> Tensor:
    generator = torch.Generator().manual_seed(part)
    return torch.randint(VOCABULARY, (2, LENGTH + 1), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def parallel(model: Transformer, kind: str) -> nn.Module:
    if "tensor" in kind:
        plan: dict[str, Any] = {
            **{name: ColwiseParallel() for name in ("query", "key", "value", "up")},
            **{name: RowwiseParallel() for name in ("out", "down")},
        }
        for block in model.blocks:
            parallelize_module(block, mixes.mesh_of("tp"), plan)
    policy: dict[str, Any] = {}
    if "bfloat16" in kind:
        policy["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    mesh = {"fsdp": mixes.FLAT, "hsdp": mixes.GRID}.get(kind.split()[0], "dp")
    for block in model.blocks:
        fully_shard(block, mesh=mixes.mesh_of(mesh), **policy)
    # Beside the blocks, so that their parameters are of another kind: sharded over all ranks, where
    # those of the blocks are also split by tensor parallelism.
    fully_shard(model, mesh=mixes.mesh_of(mesh), **policy)
    return model


def data_part(kind: str) -> int:
    """Which part of the batch this rank has."""
    if kind.startswith(("fsdp", "hsdp")):
        return torch.distributed.get_rank()
    return mixes.mesh_of("dp").get_local_rank()


# On the ranks.


def train(kind: str, function: str, norm_type: float, max_norm: float) -> Any:
    torch.manual_seed(0)
    model = parallel(Transformer(), kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    part = data_part(kind)
    clipper = gradclip_ext.GradClipper(model, max_norm, norm_type=norm_type)
    losses, norms = [], []
    for _ in range(STEPS):
        loss = loss_of(model, batch(part))
        loss.backward()
        if function == "torch":
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type)
        elif function == "GradClipper":
            norm = clipper.clip_()
        else:
            norm = gradclip_ext.clip_grad_norm_(model.parameters(), max_norm, norm_type)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / torch.distributed.get_world_size())
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
    return losses, norms


def sequence_parallel() -> Any:
    """Gradients of norms are partial: they come from different parts of a sequence."""
    torch.manual_seed(0)
    mesh = mixes.mesh_of("tp")
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    x = torch.randn(2, LENGTH, WIDTH)
    loss = model(x).pow(3).mean()
    loss.backward()
    wholes = [parameter.grad.double() for parameter in model.parameters()]
    expected = torch.cat([whole.flatten() for whole in wholes]).norm().item()
    model.zero_grad()
    parallelize_module(
        model,
        mesh,
        {
            "0": SequenceParallel(),
            "1": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(1)),
            "2": SequenceParallel(),
        },
    )
    split = DTensor.from_local(x, mesh, [Replicate()], run_check=False).redistribute(
        mesh, [Shard(1)]
    )
    out = model(split)
    out = out.full_tensor() if isinstance(out, DTensor) else out
    out.pow(3).mean().backward()
    kinds = {str(p.grad.placements[0]) for p in model.parameters() if isinstance(p.grad, DTensor)}
    norm = gradclip_ext.clip_grad_norm_(model.parameters(), 1.0, dtype=torch.float64)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    for parameter, whole in zip(model.parameters(), wholes, strict=True):
        gradient = parameter.grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        torch.testing.assert_close(
            gradient.double(), whole / (expected + 1e-6), rtol=1e-4, atol=1e-6
        )
    return norm.item(), expected, sorted(kinds)


# In the test process.

KINDS = ["fsdp", "fsdp bfloat16", "hsdp", "data and tensor"]


@pytest.mark.parametrize("function", ["clip_grad_norm_", "GradClipper"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_losses_as_torch(world, kind, function):
    answers = world(4).run(train, kind, function, 2.0, 0.5, seconds=60)
    assert all(answer == answers[0] for answer in answers)
    losses, norms = answers[0]
    assert max(norms) > 0.5 and losses[-1] < losses[0]
    # Where parameters are on two meshes, torch's function raises: one process is the reference.
    reference = "alone" if kind == "data and tensor" else "torch"
    expected = (
        alone()
        if reference == "alone"
        else world(4).run(train, kind, "torch", 2.0, 0.5, seconds=60)[0]
    )
    rel = 2e-5 if reference == "alone" else 2e-6
    assert losses == pytest.approx(expected[0], rel=rel)
    assert norms == pytest.approx(expected[1], rel=1e-4 if reference == "alone" else 2e-6)


def alone() -> Any:
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, norms = [], []
    for _ in range(STEPS):
        loss = sum(loss_of(model, batch(part)) for part in range(2)) / 2
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def test_sequence_parallel(world):
    answers = world(2).run(sequence_parallel)
    assert answers[0] == answers[1]
    norm, expected, kinds = answers[0]
    assert norm == pytest.approx(expected, rel=1e-5)
    assert any(kind.startswith("P") for kind in kinds), kinds
