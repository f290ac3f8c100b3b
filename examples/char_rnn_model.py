"""The textbook's character-level recurrent network and its data, for char_rnn.py and the benchmark.

Text, batches, network and initialization follow "Dive into Deep Learning", RNN implementation from
scratch. The text is Python's own help, so nothing is downloaded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = " abcdefghijklmnopqrstuvwxyz"
BATCH_SIZE = 32
SEQUENCE_LENGTH = 35
LEARNING_RATE = 1.0
INITIAL_SCALE = 0.01


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
