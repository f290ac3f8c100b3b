"""Why gradients are clipped: a character-level recurrent network, trained from scratch three times.

The network, its initialization and its training follow the textbook chapter on recurrent networks
("Dive into Deep Learning", RNN implementation from scratch): 512 hidden units, 32 sequences of 35
characters, plain SGD with learning rate 1, gradients clipped to norm 1. It is trained once without
clipping, once with torch.nn.utils and once with gradclip_ext. All else is equal in the three runs.

    pip install matplotlib tqdm
    python examples/char_rnn.py

The training text is Python's own help, so nothing is downloaded. The only departure from the
textbook is to use 3000 characters instead of 10000, so that its 500 epochs take 1000 steps, and the
three runs about two minutes. With --characters 10000 training without clipping blows up as well,
but only after some 1600 steps.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from char_rnn_model import (
    BATCH_SIZE,
    LEARNING_RATE,
    SEQUENCE_LENGTH,
    VOCABULARY,
    CharacterRNN,
    encode,
    read_text,
    sequential_batches,
)
from char_rnn_report import Comparison, Run, save_figure, save_json, summary
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import gradclip_ext

# Takes parameters and max_norm, clips the gradients in place, returns their norm before clipping.
ClipFunction = Callable[[Sequence[nn.Parameter], float], Tensor]


def train(name: str, clip: ClipFunction, text: Tensor, options: argparse.Namespace) -> Run:
    """Trains a new network on the text, of shape (characters,), and returns what was measured."""
    # Initialization and data order depend on the seed alone, so they are the same in every run.
    generator = torch.Generator().manual_seed(options.seed)
    model = CharacterRNN(options.hidden, generator)
    parameters = list(model.parameters())
    batches = sequential_batches(text, generator)
    run = Run(name)
    start = time.perf_counter()

    # disable=None: a bar on a terminal, nothing if the output is redirected.
    progress = tqdm(range(options.steps), desc=name.ljust(14), leave=False, disable=None)
    for _ in progress:
        inputs, targets, epoch_begins = next(batches)
        if epoch_begins:
            state = model.initial_state(BATCH_SIZE)
        # Without detach, gradients would flow back through all batches of the epoch.
        logits, state = model(inputs, state.detach())
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.T.flatten())
        run.losses.append(loss.item())
        if not math.isfinite(run.losses[-1]):
            break
        loss.backward()

        before = time.perf_counter()
        norm = clip(parameters, options.max_norm)
        run.clip_seconds.append(time.perf_counter() - before)
        run.gradient_norms.append(norm.item())

        with torch.no_grad():
            for parameter in parameters:
                parameter -= LEARNING_RATE * parameter.grad
                parameter.grad = None
        progress.set_postfix(loss=f"{run.losses[-1]:.3g}", refresh=False)

    run.seconds = time.perf_counter() - start
    run.sample = model.complete("the ", 50)
    return run


class NoClipping:
    """Leaves the gradients alone, and lets the clipping functions clip copies of them.

    Training amplifies tiny differences from step to step. Whether a function clips correctly shows
    better when all are given the same gradients, here including the exploding ones.
    """

    def __init__(self, clip_functions: dict[str, ClipFunction]) -> None:
        """Takes the functions to compare, by name."""
        self.clip_functions = clip_functions
        self.differences: dict[str, list[float]] = {name: [] for name in clip_functions}

    def __call__(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Returns the norm of the gradients."""
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        # Gradients that are all zero or not finite cannot be scaled to max_norm.
        if norm.isfinite() and norm > 0:
            reference = torch.nn.utils.clip_grad_norm_
            exact = clipped_copies(reference, parameters, max_norm, torch.float64)
            for name, clip in self.clip_functions.items():
                actual = clipped_copies(clip, parameters, max_norm, torch.float32)
                self.differences[name].append(relative_difference(actual, exact))
        return norm


def clipped_copies(
    clip: ClipFunction, parameters: Sequence[nn.Parameter], max_norm: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Clips copies of the gradients; returns them flattened, and their norm before clipping."""
    copies = [nn.Parameter(torch.empty_like(parameter, dtype=dtype)) for parameter in parameters]
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.grad = parameter.grad.to(dtype, copy=True)
    norm = clip(copies, max_norm)
    return torch.cat([copy.grad.flatten() for copy in copies]), norm


def relative_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the largest relative distance of an actual tensor from the expected one."""
    distances = [(a - e).norm() / e.norm() for a, e in zip(actual, expected, strict=True)]
    return torch.stack(distances).max().item()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Trains a character-level recurrent network without clipping, with "
        "torch.nn.utils and with gradclip_ext, and compares the three.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=1000, help="training steps per run")
    parser.add_argument("--seed", type=int, default=0, help="for initialization and data order")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; two pay off only on an idle machine"
    )
    parser.add_argument("--hidden", type=int, default=512, help="hidden units")
    parser.add_argument("--max-norm", type=float, default=1.0, help="largest norm allowed")
    parser.add_argument("--characters", type=int, default=3000, help="length of the text")
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="folder for the figure and the numbers"
    )
    options = parser.parse_args(arguments)
    for name in ("steps", "threads", "hidden"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} has to be at least 1")
    # Even with the largest offset, a row must hold one sequence.
    fewest = BATCH_SIZE * SEQUENCE_LENGTH + SEQUENCE_LENGTH
    if options.characters < fewest:
        parser.error(f"--characters has to be at least {fewest}, to fill a batch")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains three times and reports; returns 0 if the two clipped runs agree, else 1."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    text = encode(read_text(options.characters))

    clip_functions: dict[str, ClipFunction] = {
        "torch.nn.utils": torch.nn.utils.clip_grad_norm_,
        "gradclip_ext": gradclip_ext.clip_grad_norm_,
    }
    no_clipping = NoClipping(clip_functions)
    runs = []
    for name, clip in {"no clipping": no_clipping, **clip_functions}.items():
        run = train(name, clip, text, options)
        print(f"{name:14} {len(run.losses)} steps in {run.seconds:.0f} s", flush=True)
        runs.append(run)

    comparison = Comparison(*runs, options.max_norm, len(VOCABULARY), no_clipping.differences)
    options.out.mkdir(parents=True, exist_ok=True)
    save_figure(comparison, options.out / "char_rnn.png")
    save_json(comparison, vars(options), options.out / "char_rnn.json")
    print(summary(comparison))
    print(f"\nFigure and numbers: {options.out}/char_rnn.png and char_rnn.json")
    return 0 if comparison.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
