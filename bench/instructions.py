"""Calls the functions whose instructions bench/instructions.sh counts; does nothing without it.

Under callgrind it leaves a file of counts for every case and number of calls, told by the library
that is its first argument. What a call costs is then the difference of two files: start-up, warm-up
and the counting itself cancel out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_ as torch_clip_grad_norm_
from torch.nn.utils import get_total_norm as torch_get_total_norm

import gradclip_ext

ELEMENTS = 8
WARM_UP = 4
CALLS = (4, 12)

# Above every norm here; and below it, for as many calls as there are in one case.
QUIET = [1e9] * (WARM_UP + sum(CALLS))
CLIP = [2.0**-step for step in range(len(QUIET))]


def parameters(count: int) -> list[Tensor]:
    """As many parameters with gradients whose joint norm is 2."""
    values = [torch.zeros(ELEMENTS, requires_grad=True) for _ in range(count)]
    for value in values:
        value.grad = torch.full((ELEMENTS,), 2.0 / (count * ELEMENTS) ** 0.5)
    return values


def cases(count: int) -> dict[str, tuple[Callable[[float], object], list[float]]]:
    """What to call with which arguments, one after the other."""
    list_of = parameters(count)
    gradients = [parameter.grad for parameter in parameters(count)]
    clipper = gradclip_ext.GradClipper(parameters(count), max_norm=QUIET[0])
    return {
        "clip_grad_norm_, quiet": (
            lambda max_norm: gradclip_ext.clip_grad_norm_(list_of, max_norm),
            QUIET,
        ),
        "clip_grad_norm_, clip": (
            lambda max_norm: gradclip_ext.clip_grad_norm_(list_of, max_norm),
            CLIP,
        ),
        "get_total_norm": (lambda _: gradclip_ext.get_total_norm(gradients), QUIET),
        "GradClipper.clip_, quiet": (lambda _: clipper.clip_(), QUIET),
        "torch's clip_grad_norm_": (
            lambda max_norm: torch_clip_grad_norm_(list_of, max_norm),
            CLIP,
        ),
        "torch's get_total_norm": (lambda _: torch_get_total_norm(gradients), QUIET),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counting", help="library that starts, stops and names counts")
    parser.add_argument("--tensors", type=int, nargs="+", default=[1, 20, 1000])
    options = parser.parse_args()
    counting = ctypes.CDLL(options.counting)
    torch.set_num_threads(1)
    gc.disable()
    for count in options.tensors:
        for name, (call, arguments) in cases(count).items():
            rest = iter(arguments)
            for calls in (WARM_UP, *CALLS):
                taken = [next(rest) for _ in range(calls)]
                counting.start()
                for argument in taken:
                    call(argument)
                counting.stop(f"{count}|{name}|{calls}".encode())


if __name__ == "__main__":
    main()
