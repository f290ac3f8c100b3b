"""Why gradients are clipped: a character-level recurrent network, trained from scratch three times.

The network, its initial values and its training are those of the textbook chapter on recurrent
networks ("Dive into Deep Learning", RNN implementation from scratch): 512 hidden units, 32
sequences of 35 characters, plain gradient descent with learning rate 1, gradients clipped to norm
1. It is trained once without clipping, once with the clipping of torch.nn.utils and once with that
of gradclip_ext. Everything else is the same in all three runs.

    pip install matplotlib tqdm
    python examples/char_rnn.py

The text to learn is Python's own help, so nothing is downloaded. The only departure from the
textbook is to read 3000 characters of it instead of 10000. The 500 epochs of the textbook then take
1000 steps, and the three runs about two minutes. With --characters 10000 the training without
clipping blows up as well, but only after some 1600 steps.
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

# Takes parameters and the largest norm that their gradients may have, clips the gradients in place
# and returns the norm that they had before.
ClipFunction = Callable[[Sequence[nn.Parameter], float], Tensor]


def read_text(characters: int) -> str:
    """The first characters of Python's help, as nothing but lowercase letters and single spaces."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        sys.exit("This Python comes without pydoc_data, whose help texts are the text to learn.")
    everything = " ".join(topics[name] for name in sorted(topics))
    text = re.sub("[^a-z]+", " ", everything.lower()).strip()
    if len(text) < characters:
        sys.exit(f"Python's help has {len(text)} characters, fewer than --characters {characters}.")
    return text[:characters]


def sequential_batches(
    text: Tensor, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yields inputs, targets and whether an epoch begins, without end.

    The text, of shape (characters,), is cut into as many long rows as a batch has sequences. Each
    batch continues the rows where the one before it ended, so the network can keep its state.
    Inputs and targets have the shape (batch, sequence); a target is the character after the input.
    """
    while True:
        # Every epoch starts elsewhere, so that the text is not always cut at the same places.
        offset = int(torch.randint(SEQUENCE_LENGTH, (), generator=generator))
        row_length = (len(text) - offset - 1) // BATCH_SIZE
        end = offset + row_length * BATCH_SIZE
        inputs = text[offset:end].view(BATCH_SIZE, row_length)
        targets = text[offset + 1 : end + 1].view(BATCH_SIZE, row_length)
        for start in range(0, row_length - SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH):
            columns = slice(start, start + SEQUENCE_LENGTH)
            yield inputs[:, columns], targets[:, columns], start == 0


class CharacterRNN(nn.Module):
    """A recurrent network with one hidden layer, written out; the names are the textbook's.

    The state H is a function of the character X and of the state before it, and the scores O for
    the next character are a function of the state:

        H = tanh(X W_xh + H W_hh + b_h)
        O = H W_hq + b_q
    """

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        """Draws the weights from a normal distribution; the biases start at zero."""
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
        """Reads characters of shape (batch, sequence), starting in a state (batch, hidden).

        Returns the scores of every possible next character, of shape (sequence, batch, vocabulary),
        and the state after the last character.
        """
        scores = []
        # Transposed to (sequence, batch), because the loop goes from character to character.
        for one_hot in functional.one_hot(characters.T, len(VOCABULARY)).float():
            state = torch.tanh(one_hot @ self.W_xh + state @ self.W_hh + self.b_h)
            scores.append(state @ self.W_hq + self.b_q)
        return torch.stack(scores), state

    @torch.no_grad()
    def complete(self, prefix: str, length: int) -> str:
        """Returns the prefix and what the network thinks most likely to follow it."""
        text = prefix
        scores, state = self(encode(prefix)[None, :], self.initial_state(1))
        for _ in range(length):
            likeliest = scores[-1].argmax(dim=1)
            text += VOCABULARY[int(likeliest)]
            scores, state = self(likeliest[None, :], state)
        return text


def encode(text: str) -> Tensor:
    """Returns the places of the characters in the vocabulary, of shape (characters,)."""
    return torch.tensor([VOCABULARY.index(character) for character in text])


def train(name: str, clip: ClipFunction, text: Tensor, options: argparse.Namespace) -> Run:
    """Trains a new network on the text, of shape (characters,), and returns what was measured."""
    # The initial values and the order of the data depend on the seed alone: every run has the same.
    generator = torch.Generator().manual_seed(options.seed)
    model = CharacterRNN(options.hidden, generator)
    parameters = list(model.parameters())
    batches = sequential_batches(text, generator)
    run = Run(name)
    start = time.perf_counter()

    # disable=None: a bar on a terminal, nothing where the output goes to a file.
    progress = tqdm(range(options.steps), desc=name.ljust(14), leave=False, disable=None)
    for _ in progress:
        inputs, targets, epoch_begins = next(batches)
        if epoch_begins:
            state = model.initial_state(BATCH_SIZE)
        # Without detach, the gradients would flow back through all batches of the epoch.
        scores, state = model(inputs, state.detach())
        loss = functional.cross_entropy(scores.flatten(0, 1), targets.T.flatten())
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
    """Leaves the gradients as they are, and lets the clipping functions clip copies of them.

    Training makes tiny differences bigger from step to step. Whether a function clips right is
    better seen when all are given the same gradients, and here those include the huge ones.
    """

    def __init__(self, clip_functions: dict[str, ClipFunction]) -> None:
        """Takes the functions to compare, by name."""
        self.clip_functions = clip_functions
        self.differences: dict[str, list[float]] = {name: [] for name in clip_functions}

    def __call__(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Returns the norm of the gradients."""
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        # What is not finite or only zeros, no function can clip to the norm that is asked for.
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
    """Clips copies of the gradients; returns them, all in one row, and the norm they had before."""
    copies = [nn.Parameter(torch.empty_like(parameter, dtype=dtype)) for parameter in parameters]
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.grad = parameter.grad.to(dtype, copy=True)
    norm = clip(copies, max_norm)
    return torch.cat([copy.grad.flatten() for copy in copies]), norm


def relative_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the largest distance of two tensors, relative to the expected one."""
    distances = [(a - e).norm() / e.norm() for a, e in zip(actual, expected, strict=True)]
    return torch.stack(distances).max().item()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Trains a character-level recurrent network without clipping, with that of "
        "torch.nn.utils and with that of gradclip_ext, and compares the three.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="for initial values and data order")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; two pay only on an idle machine"
    )
    parser.add_argument("--hidden", type=int, default=512, help="hidden units")
    parser.add_argument("--max-norm", type=float, default=1.0, help="theta: clip to this norm")
    parser.add_argument("--characters", type=int, default=3000, help="length of the text")
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="folder for the figure and the numbers"
    )
    options = parser.parse_args(arguments)
    for name in ("steps", "threads", "hidden"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} has to be at least 1")
    # Even the shortest row of an epoch has to hold one sequence.
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
