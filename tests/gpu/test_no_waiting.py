"""No call makes the host wait for the GPU, unless it has to answer on the host."""

from __future__ import annotations

import math

import pytest
import reference as ref
import torch
from on_gpu import ONLY_ON_A_GPU

import gradclip_ext
from gradclip_ext import AGC, AdaGC, AutoClip, GradClipper, TimesLimit, ZClip

pytestmark = ONLY_ON_A_GPU

# How a list is made of two ordinary gradients.
LISTS = {
    "native": lambda ordinary: ordinary,
    "frozen": lambda ordinary: [ordinary[0], None, ordinary[1]],
    "twice": lambda ordinary: [*ordinary, ordinary[0]],
    "strided": lambda ordinary: [*ordinary, ordinary[0].clone()[:, ::2]],
    "strided, 16 bits": lambda ordinary: [*ordinary, ordinary[0].bfloat16()[:, ::2]],
}
by_list = pytest.mark.parametrize("make", LISTS.values(), ids=LISTS)

NUMBER = 0.5
CALLS = {
    "clip_grad_norm_": lambda p, on_gpu: gradclip_ext.clip_grad_norm_(p, NUMBER),
    "clip_grad_norm_, L3": lambda p, on_gpu: gradclip_ext.clip_grad_norm_(p, NUMBER, 3.0),
    "clip_grad_norm_, a tensor": lambda p, on_gpu: gradclip_ext.clip_grad_norm_(p, on_gpu),
    "get_total_norm": lambda p, on_gpu: gradclip_ext.get_total_norm(
        [parameter.grad for parameter in p if parameter.grad is not None]
    ),
    "clip_grads_with_norm_": lambda p, on_gpu: gradclip_ext.clip_grads_with_norm_(p, NUMBER, 3.0),
    "clip_grads_with_norm_, a tensor": lambda p, on_gpu: gradclip_ext.clip_grads_with_norm_(
        p, NUMBER, on_gpu
    ),
    "clip_grad_value_": lambda p, on_gpu: gradclip_ext.clip_grad_value_(p, NUMBER),
    "grad_norms": lambda p, on_gpu: gradclip_ext.grad_norms(p),
}
CLIPPERS = {
    "number": {"max_norm": 0.5},
    "infinity": {"max_norm": math.inf},
    "L3": {"max_norm": 0.5, "norm_type": 3.0},
    "AutoClip": {"max_norm": AutoClip},
    "ZClip": {"max_norm": lambda: ZClip(warmup_steps=1)},
    "AdaGC": {"max_norm": lambda: AdaGC(warmup_steps=1)},
    "value": {"clip_value": 0.1},
    "zero": {"max_norm": 0.5, "nonfinite": "zero"},
    "skip": {"max_norm": 0.5, "nonfinite": "skip"},
    "spikes": {"max_norm": 0.5, "skip_above": 1e6},
    "times": {"max_norm": AutoClip, "skip_above": TimesLimit(3.0)},
}


def made(make):
    ordinary = [ref.random_gradient((40, 30), seed=seed).cuda() for seed in range(2)]
    return [ref.parameter(gradient) for gradient in make(ordinary)]


def call_twice(call):
    """The first time, what is kept on the GPU may be copied there."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_list
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_functions(call, make):
    parameters = made(make)
    on_gpu = torch.tensor(3.0, device="cuda")
    call_twice(lambda: call(parameters, on_gpu))


@by_list
@pytest.mark.parametrize("arguments", CLIPPERS.values(), ids=CLIPPERS)
def test_clippers(arguments, make):
    if callable(arguments.get("max_norm")):
        arguments = {**arguments, "max_norm": arguments["max_norm"]()}
    call_twice(GradClipper(made(make), **arguments).clip_)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("rule", [lambda: 0.5, AGC, AutoClip], ids=["number", "AGC", "AutoClip"])
def test_clippers_of_groups(rule, weight_decay):
    first, second = made(LISTS["native"])
    groups = [{"params": [first]}, {"params": [second]}]
    call_twice(GradClipper(groups, [rule(), 0.7], weight_decay=weight_decay).clip_)


def test_a_call_that_waits_is_seen():
    parameters = made(LISTS["native"])
    with pytest.raises(RuntimeError, match="synchronizing"):
        call_twice(lambda: gradclip_ext.clip_grad_norm_(parameters, 1.0).item())
