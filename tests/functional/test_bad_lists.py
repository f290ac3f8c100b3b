"""Lists that are bad for sums in float32: built by hand, and searched for.

A norm in float32 is summed in short chains of float32, so values can be found whose roundings all
go in one direction. The error stays within the bound that follows from the number of roundings.
"""

from __future__ import annotations

import pytest
import reference as ref
import torch
from parametrize import by_native_dtype

import gradclip_ext
from gradclip_ext import grad_norms

by_norm_type = pytest.mark.parametrize("norm_type", [1.0, 2.0])

# How much of the bound is reached: by the built lists on the CPU, and by the search in values
# between 0.5 and 2. Less would mean that the bound can be lowered.
BUILT_ULPS = {1.0: 5.9, 2.0: 3.3}
FOUND_ULPS = {1.0: 2.0, 2.0: 1.0}
SEARCHED_ROWS = 64
SEARCHED_ELEMENTS = 2048
# 31 * 2^14: so many numbers just above 1, whose chains add up to just above powers of two, have a
# sum just below one.
LONG_LIST = 507_904


@pytest.fixture(autouse=True)
def one_thread():
    """Many small operations would wait for threads on a busy machine; the bits are the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cpu_block(lanes: int, norm_type: float, step: int) -> torch.Tensor:
    """A block of a short run for vectors of so many float32: four streams of four pairs."""
    number, crumb = number_and_crumb(norm_type)
    block = torch.zeros(4, 4, 2, lanes)
    block[0, :, 0] = crumb
    block[0, step, 0] = number
    # The partners of the first sum where 8 of them are folded half with half.
    block[2, 0, 0] = block[1, 0, 0] = block[0, 0, 1] = crumb
    return block.flatten()


def cuda_block(threads: int, norm_type: float, step: int) -> torch.Tensor:
    """What a block of so many threads reads at once: four vectors of four float32 each."""
    number, crumb = number_and_crumb(norm_type)
    block = torch.zeros(4, threads, 4)
    block[:, :, 0] = crumb
    block[step, :, 0] = number
    block[0, :, 2] = block[0, :, 1] = crumb
    return block.flatten()


def number_and_crumb(norm_type: float) -> tuple[float, float]:
    """A number, and one that every sum loses to which it is added: half a unit, rounded to even."""
    if norm_type == 1.0:
        return 1.0, 2.0**-24
    # The square of the number ends in half a unit, too.
    return 1.0 + 2.0**-12, 2.0**-12


BLOCKS = {
    "portable": (cpu_block, 4),
    "avx2": (cpu_block, 8),
    "avx512": (cpu_block, 16),
    "cuda": (cuda_block, 256),
}


def worst_of_built_lists(norm_type: float, layout: str) -> float:
    block_of, width = BLOCKS[layout]
    worst = 0.0
    for step in (0, 1):
        block = block_of(width, norm_type, step)
        # With these counts the norm is just below a power of two for some of the widths.
        for count in (1, 15, 31, 63, 125, 127, 255):
            gradients = [block.repeat(count)]
            norm = gradclip_ext.get_total_norm(gradients, norm_type)
            worst = max(worst, ref.norm_error(norm, ref.reference_norm(gradients, norm_type)))
    return worst


@by_norm_type
@pytest.mark.parametrize("layout", BLOCKS)
def test_built_lists_are_within_the_bound(layout, norm_type):
    assert worst_of_built_lists(norm_type, layout) <= ref.LARGEST_FLOAT32_NORM_ULPS[norm_type]


@pytest.mark.cpu_only
@by_norm_type
def test_built_lists_reach_the_bound(norm_type):
    worst = max(worst_of_built_lists(norm_type, layout) for layout in BLOCKS)
    assert worst > BUILT_ULPS[norm_type]


class Search:
    """Hill climbing among the values that are repeated to fill a list, many lists at a time."""

    def __init__(self, norm_type: float, period: int, dtype: torch.dtype) -> None:
        self.norm_type = norm_type
        self.generator = torch.Generator().manual_seed(period)
        self.lists = torch.empty(SEARCHED_ROWS, SEARCHED_ELEMENTS, dtype=dtype)
        self.holders = [ref.Holder(row) for row in self.lists]
        self.best = self.drawn(period)[0]
        self.error = 0.0

    def drawn(self, period: int) -> torch.Tensor:
        """Values between 0.5 and 2, half of them just above 1."""
        shape = (SEARCHED_ROWS, period)
        anywhere = torch.empty(shape).uniform_(0.5, 2.0, generator=self.generator)
        steps = torch.randint(0, 2**13, shape, generator=self.generator)
        is_anywhere = torch.rand(shape, generator=self.generator) < 0.5
        return torch.where(is_anywhere, anywhere, 1.0 + steps * 2.0**-23)

    def climb(self, generations: int) -> None:
        period = len(self.best)
        share = min(1.0, 1.5 / period)
        for _ in range(generations):
            changes = torch.rand((SEARCHED_ROWS, period), generator=self.generator) < share
            candidates = torch.where(changes, self.drawn(period), self.best)
            errors = self.errors(candidates)
            if errors.max() > self.error:
                self.error = errors.max().item()
                self.best = candidates[errors.argmax()]

    def errors(self, values: torch.Tensor) -> torch.Tensor:
        """Relative errors of the norms, not yet rounded, of the lists of these values."""
        self.lists.copy_(
            values.repeat(1, SEARCHED_ELEMENTS // values.shape[1] + 1)[:, :SEARCHED_ELEMENTS]
        )
        found = grad_norms(self.holders, self.norm_type).norms
        wide = self.lists.double()
        expected = wide.sum(1) if self.norm_type == 1.0 else (wide * wide).sum(1).sqrt()
        return (found / expected - 1.0).abs()

    def long_list(self) -> torch.Tensor:
        values = self.best.to(self.lists.dtype)
        return values.repeat(LONG_LIST // len(values) + 1)[:LONG_LIST]


@pytest.mark.cpu_only
@by_norm_type
def test_search_stays_within_the_bound(norm_type):
    worst = 0.0
    for period in (1, 3, 7, 8, 16, 32, 64, 128, 256):
        search = Search(norm_type, period, torch.float32)
        search.climb(200)
        assert search.error <= ref.CHAIN_ERROR[norm_type]
        worst = max(worst, search.error)
        gradients = [search.long_list()]
        norm = gradclip_ext.get_total_norm(gradients, norm_type)
        error = ref.norm_error(norm, ref.reference_norm(gradients, norm_type))
        assert error <= ref.LARGEST_FLOAT32_NORM_ULPS[norm_type]
    assert worst > FOUND_ULPS[norm_type] * 2**-24


@pytest.mark.cpu_only
@by_norm_type
@by_native_dtype
def test_search_in_every_dtype(dtype, norm_type):
    for period in (5, 64):
        search = Search(norm_type, period, dtype)
        search.climb(40)
        assert search.error <= (
            4 * 2.0**-53 if dtype == torch.float64 else ref.CHAIN_ERROR[norm_type]
        )
        gradients = [search.long_list()]
        norm = gradclip_ext.get_total_norm(gradients, norm_type)
        expected = ref.reference_norm(gradients, norm_type)
        if dtype == torch.float32:
            assert ref.norm_error(norm, expected) <= ref.LARGEST_FLOAT32_NORM_ULPS[norm_type]
        else:
            ref.assert_norm(norm, gradients, norm_type)
