"""What ranks tell one another to clip by one norm: small vectors, and nothing that can hang.

Every rank that is reached goes through the same collectives whatever it holds and whatever has
failed on it, since all of them depend on meshes and process groups alone. A failure travels in the
vector, so that all ranks raise. What travels is the sum of the power sums of norms; for the
infinity norms it is the maximum of the bits of magnitudes, of which NaN is the largest, while the
maximum of floating point numbers loses NaN.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip_ext._ops import torch_distributed
from gradclip_ext._ops.meshes import Dimension, Mesh
from gradclip_ext._ops.observation import observed
from gradclip_ext._ops.process_groups import Group

__all__ = ["NAN_BITS", "PUBLICATIONS", "Exchange", "Flags", "host_knows", "padded_length"]

_LEAST_LENGTH, _NEXT_LENGTH = 512, 8
# How many texts of a rank are kept for the others.
PUBLICATIONS = 16

# The bits of an infinite float64, and what stands for NaN, whose own bits may be others.
_INFINITY_BITS = 0x7FF0000000000000
NAN_BITS = _INFINITY_BITS + (1 << 51)
# Smaller than what any number is encoded as.
_NOTHING = -(2**63)

# Constants on their devices; not written to.
_made: dict[tuple[Any, ...], Tensor] = {}
_MOST_MADE = 1000

# At the end of each vector of sums: how many ranks take part; the sum of their signatures and of
# the squares of these; how many disagreements were found; how many ranks have failed, the sum of
# their ranks and of the squares of these, which tells a single one, and of the numbers of what they
# have published; the same of those that hold something that is not finite.
# At the end of each vector of maxima: signature, its negative, the bits of a NaN, disagreements,
# which rank has failed and what it has published in one number, likewise for what is not finite,
# and zeros up to the same length. So all find out where one rank sums and another maximizes: the
# NaN spoils what is taken for squares, and a sum read as bits is larger than any signature.
_SUMS = 4
_FIRST_CARRIED = 3


class Flags(NamedTuple):
    """What the end of a vector says: numbers on the host, or 0-dim tensors that are not read."""

    disagrees: Any
    failed: Any
    # A single rank and the number of what it has published; None where there are several.
    failed_rank: tuple[int, int] | None
    nonfinite_rank: tuple[int, int] | None
    # Whether the host knows all this.
    is_known: bool

    @property
    def is_known_to_fail(self) -> bool:
        """Whether the host knows that a rank has failed."""
        return self.is_known and bool(self.failed or self.disagrees)


class Exchange:
    """The collectives of one call.

    Args:
        meshes: all that the gradients and parameters of the call have, and this rank is in.
        partial: the keys of meshes with what all their ranks know of gradients that have yet to be
            added up.

    Attributes:
        meshes: those of which this rank is a member, in canonical order.
        groups: the process groups that were passed.
        device: where vectors travel.
        flags: what the last vector told of all ranks; None before the first.
        tail: the end of that vector.
    """

    def __init__(
        self,
        meshes: Sequence[Mesh],
        groups: Sequence[Group],
        device: torch.device,
        norm_type: float,
        partial: Sequence[tuple[tuple[Any, ...], object]] = (),
    ) -> None:
        self.meshes = sorted({mesh.key: mesh for mesh in meshes}.values(), key=lambda m: m.key)
        # Those with the same ranks may have groups of their own, one of which is to be used.
        self._all_meshes = meshes
        self.groups = groups
        self.device = device
        self.rank = torch.distributed.get_rank() if self._travels() else 0
        self.is_maximum = math.isinf(norm_type)
        self._has_infinite_powers = norm_type < 0.0
        self._norm_type = norm_type
        self._partial = sorted(partial)
        self.has_failed = False
        self.holds_nonfinite = False
        # The number of what this rank has published of either.
        self.publication = 0
        self._carried: Tensor | None = None
        self.flags: Flags | None = None
        self.tail: Tensor | None = None

    def _travels(self) -> bool:
        return bool(self.groups) or any(any(mesh.dimensions) for mesh in self.meshes)

    def over_meshes(
        self, values: dict[tuple[Any, ...], Tensor], but: Sequence[tuple[Any, ...]] = ()
    ) -> None:
        """Reduce the values of each mesh over all its dimensions, except for those ``but``.

        Args:
            values: for the key of each mesh a 1-D tensor, of the same length on all its ranks.
                Replaced by what they became.
            but: keys of dimensions.
        """
        dimensions: dict[Any, Dimension] = {}
        for mesh in self._all_meshes:
            for d in mesh.dimensions if mesh.key in values else ():
                if d and (d.key not in dimensions or d.order < dimensions[d.key].order):
                    dimensions[d.key] = d
        for key in sorted(dimensions):
            if key in but:
                continue
            moving = [
                mesh.key
                for mesh in self.meshes
                if mesh.key in values and any(d and d.key == key for d in mesh.dimensions)
            ]
            lengths = [len(values[mesh]) for mesh in moving]
            partial = [pair for pair in self._partial if pair[0] in moving]
            told = ("mesh", key, moving, lengths, partial)
            reduced = self._reduce([values[m] for m in moving], dimensions[key].group, told)
            values.update(zip(moving, torch.split(reduced, lengths), strict=True))

    def over_groups(self, buckets: list[Tensor]) -> None:
        """Reduce over the process groups, one after another.

        Args:
            buckets: ``2 ** len(groups)`` 1-D tensors of the same length; the one at a place travels
                over the groups whose bits are set in the number of the place. Replaced.
        """
        flags, covering = self.flags, [mesh.ranks for mesh in self.meshes]
        for place, group in enumerate(self.groups):
            if (
                flags
                and flags.is_known
                and flags.failed
                and any(ranks.issuperset(group.ranks) for ranks in covering)
            ):
                # All its ranks know, and the one that failed may not know the group.
                continue
            moving = [number for number in range(len(buckets)) if number >> place & 1]
            for number in moving:
                for earlier, other in enumerate(self.groups[:place]):
                    is_within = set(other.ranks) < set(group.ranks)
                    if number >> earlier & 1 and is_within and not other.is_first:
                        buckets[number] = self.neutral(buckets[number])
            length = len(buckets[0])
            told = ("group", place, len(self.groups), length)
            reduced = self._reduce([buckets[n] for n in moving], group.group, told)
            for number, bucket in zip(moving, torch.split(reduced, length), strict=True):
                buckets[number] = bucket

    def bits_of(self, mesh: Mesh | None) -> int:
        """Over which process groups travels what was reduced over a mesh, as bits."""
        bits = 0
        for place, group in enumerate(self.groups):
            ranks = set(group.ranks)
            earlier = (g for i, g in enumerate(self.groups[:place]) if bits >> i & 1)
            is_covered = mesh is not None and ranks <= mesh.ranks
            if not is_covered and not any(ranks < set(other.ranks) for other in earlier):
                bits |= 1 << place
        return bits

    def hands_on(self, mesh: Mesh | None) -> bool:
        """Whether this rank's value of a mesh counts in groups that hold all ranks of a dimension.

        After the reduction all of these have the same.
        """
        bits = self.bits_of(mesh)
        for dimension in mesh.dimensions if mesh is not None else ():
            for place, group in enumerate(self.groups):
                if dimension is None or dimension.is_first or not bits >> place & 1:
                    continue
                if set(dimension.ranks) <= set(group.ranks):
                    return False
        return True

    def neutral(self, values: Tensor) -> Tensor:
        """What a copy contributes: nothing, or what is not finite about it."""
        if self.is_maximum:
            return torch.where(values >= _INFINITY_BITS, values, _NOTHING)
        # A zero has an infinite power if the order is negative.
        is_bad = values.isnan() if self._has_infinite_powers else values.isfinite().logical_not()
        return torch.zeros_like(values).masked_fill(is_bad, math.nan)

    def nothing(self, length: int) -> Tensor:
        """What a rank contributes that holds no gradient."""
        if self.is_maximum:
            return torch.full((length,), _NOTHING, dtype=torch.int64, device=self.device)
        return torch.zeros(length, dtype=torch.float64, device=self.device)

    def _reduce(self, parts: list[Tensor], group: Any, told: object) -> Tensor:
        signature = zlib.crc32(repr((self._norm_type, told)).encode()) & 0xFFFF
        length = sum(part.numel() for part in parts)
        padded = padded_length(length)
        padding = self.nothing(padded - length)
        operation = "max" if self.is_maximum else "sum"
        vector = torch.cat([*parts, padding, self._tail(float(signature))])
        reduced = torch_distributed.all_reduce(vector, operation, group)
        self._read_tail(reduced[padded:])
        return reduced[:length]

    def _tail(self, signature: float) -> Tensor:
        if self._carried is None:
            told = self._told()
            none = [0.0] * len(told)
            failed = told if self.has_failed else none
            nonfinite = told if self.holds_nonfinite else none
            same_length = [0.0] * (2 * (_SUMS - len(told)))
            self._carried = self._made([0.0, *failed, *nonfinite, *same_length])
        if self.is_maximum:
            numbers = [signature, -signature, float(NAN_BITS)]
            return torch.cat([self._made(numbers), self._carried])
        return torch.cat([self._made([1.0, signature, signature * signature]), self._carried])

    def _told(self) -> list[float]:
        """How a vector tells of this rank and of what it has published."""
        own = float(self.rank)
        if self.is_maximum:
            return [(own + 1.0) * PUBLICATIONS + self.publication]
        return [1.0, own, own * own, float(self.publication)]

    def _made(self, numbers: list[float]) -> Tensor:
        """Of numbers that are the same in each step, so that they travel to a GPU only once."""
        key = (self.device, self.is_maximum, *numbers)
        made = None if observed() else _made.get(key)
        if made is None:
            dtype = torch.int64 if self.is_maximum else torch.float64
            made = torch.tensor(numbers, dtype=dtype, device=self.device)
            if len(_made) < _MOST_MADE and not observed():
                _made[key] = made
        return made

    def _read_tail(self, tail: Tensor) -> None:
        self.tail = tail
        numbers: Any = tail.tolist() if host_knows(tail) else tail
        self.flags = self._flags_in(numbers, host_knows(tail))
        self._carried = tail[_FIRST_CARRIED:].clone()
        self._carried[0] = self._carried[0] + self.flags.disagrees

    def flags_in(self, tail: Tensor) -> Flags:
        """What the end of a vector says, once it has been copied to the host."""
        return self._flags_in(tail.tolist(), True)

    def _flags_in(self, numbers: Any, is_known: bool) -> Flags:
        if self.is_maximum:
            high, low, _, found, failed, nonfinite = numbers[: _FIRST_CARRIED + 3]
            disagrees = high + low != 0
            ranks = (_largest(failed), _largest(nonfinite)) if is_known else (None, None)
        else:
            count, total, squares, found, *told = numbers
            disagrees = count * squares != total * total
            failed = told[0]
            ranks = (_single(*told[:_SUMS]), _single(*told[_SUMS:])) if is_known else (None, None)
        return Flags(disagrees | (found > 0), failed > 0, *ranks, is_known)


def padded_length(length: int) -> int:
    """How many numbers travel for so many, one that most lists share.

    Where they differ, the signature tells, while a collective of different lengths would hang or
    end the process.
    """
    padded = _LEAST_LENGTH
    while padded < length:
        padded *= _NEXT_LENGTH
    return padded


def host_knows(tensor: Tensor) -> bool:
    """Whether reading it needs no device sync, and it holds numbers, as a fake tensor does not."""
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def _single(
    count: float, total: float, squares: float, publications: float
) -> tuple[int, int] | None:
    """The rank, if a single one was counted, however often; None for several or none."""
    if count < 1 or count * squares != total * total:
        return None
    return int(total / count), int(publications / count)


def _largest(number: int) -> tuple[int, int] | None:
    rank, publication = divmod(number, PUBLICATIONS)
    # Not the bits of a number that a rank has summed.
    return (rank - 1, publication) if 0 < number < 1 << 52 else None
