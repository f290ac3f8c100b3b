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
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from char_rnn_report import Comparison, Run, save_figure, save_json, summary
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import gradclip_ext

VOCABULARY = " abcdefghijklmnopqrstuvwxyz"
BATCH_SIZE = 32
SEQUENCE_LENGTH = 35
LEARNING_RATE = 1.0
INITIAL_SCALE = 0.01

# Takes parameters and max_norm, clips the gradients in place, returns their norm before clipping.
ClipFunction = Callable[[Sequence[nn.Parameter], float], Tensor]


def read_text(characters: int) -> str:
    """The first characters of Python's help, reduced to lowercase letters and single spaces."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        sys.exit("This Python comes without pydoc_data, whose help texts are the training text.")
    everything = " ".join(topics[name] for name in sorted(topics))
    text = re.sub("[^a-z]+", " ", everything.lower()).strip()
    if len(text) < characters:
        sys.exit(f"Python's help has {len(text)} characters, fewer than --characters {characters}.")
    return text[:characters]


def sequential_batches(
    text: Tensor, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Endlessly yields inputs, targets and whether an epoch begins.

    The text, of shape (characters,), is cut into as many long rows as a batch has sequences. Each
    batch continues the rows where the previous one ended, so that the network can keep its state.
    Inputs and targets have shape (batch, sequence); a target is the character after the input.
    """
    while True:
        # Every epoch starts at another offset, so that the cuts are not always the same.
        offset = int(torch.randint(SEQUENCE_LENGTH, (), generator=generator))
        row_length = (len(text) - offset - 1) // BATCH_SIZE
        end = offset + row_length * BATCH_SIZE
        inputs = text[offset:end].view(BATCH_SIZE, row_length)
        targets = text[offset + 1 : end + 1].view(BATCH_SIZE, row_length)
        for start in range(0, row_length - SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH):
            columns = slice(start, start + SEQUENCE_LENGTH)
            yield inputs[:, columns], targets[:, columns], start == 0


class CharacterRNN(nn.Module):
    """A recurrent network with one hidden layer, from scratch; the names are the textbook's.

    The state H depends on the character X and the previous state, and the logits O of the next
    character depend on the state:

        H = tanh(X W_xh + H W_hh + b_h)
        O = H W_hq + b_q
    """

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        """Draws normally distributed weights; the biases start at zero."""
        super().__init__()

        def weights(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) * INITIAL_SCALE)

        self.W_xh = weights(len(VOCABULARY), hidden)
        self.W_hh = weights(hidden, hidden)
        self.b_h = nn.Parameter(torch.zeros(hidden))
        self.W_hq = weights(hidden, len(VOCABULARY))
        self.b_q = nn.Parameter(torch.zeros(len(VOCABULARY)))

    def initial_state(self, batch_size: int) -> Tensor:
        """Returns zeros of shape (batch, hidden)."""
        return torch.zeros(batch_size, len(self.b_h))

    def forward(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Reads characters of shape (batch, sequence) from a state of shape (batch, hidden).

        Returns the logits of the next characters, of shape (sequence, batch, vocabulary), and the
        state after the last character.
        """
        logits = []
        # Transposed to (sequence, batch), because the loop is over time.
        for one_hot in functional.one_hot(characters.T, len(VOCABULARY)).float():
            state = torch.tanh(one_hot @ self.W_xh + state @ self.W_hh + self.b_h)
            logits.append(state @ self.W_hq + self.b_q)
        return torch.stack(logits), state

    @torch.no_grad()
    def complete(self, prefix: str, length: int) -> str:
        """Returns the prefix and its greedy continuation."""
        text = prefix
        logits, state = self(encode(prefix)[None, :], self.initial_state(1))
        for _ in range(length):
            likeliest = logits[-1].argmax(dim=1)
            text += VOCABULARY[int(likeliest)]
            logits, state = self(likeliest[None, :], state)
        return text


def encode(text: str) -> Tensor:
    """Returns the indices of the characters in the vocabulary, of shape (characters,)."""
    return torch.tensor([VOCABULARY.index(character) for character in text])


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
