"""Norms as what can be added up over ranks, or maximized, and back.

A norm is the root of a sum of powers. What is not a power of elements, the infinity norms, travels
as the bits of magnitudes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _C
from gradclip_ext._ops import torch_distributed
from gradclip_ext._ops.exchange import NAN_BITS, Exchange
from gradclip_ext._ops.meshes import Mesh
from gradclip_ext._ops.shares import Share, Shares
from gradclip_ext._ops.torch_ops import summed_dtype, tensor_norm

__all__ = ["Algebra"]


class Algebra:
    """What each rank contributes to an exchange, and what becomes of it."""

    def __init__(
        self,
        exchange: Exchange,
        shares: Shares,
        norm_type: float,
        has_each: bool,
        sections: Sequence[int],
    ) -> None:
        self.exchange = exchange
        self._shares = shares
        self._norm_type = norm_type
        self._has_each = has_each
        self._sections = sections
        length = shares.count if has_each else 1
        self.values: dict[tuple[Any, ...], Tensor] = {
            mesh.key: exchange.nothing(length) for mesh in exchange.meshes
        }
        self._meshes: dict[tuple[Any, ...], Mesh | None] = {m.key: m for m in exchange.meshes}
        if any(share.mesh is None for share in shares.shares) or not self.values:
            # Of tensors that no mesh distributes.
            self.values[()] = exchange.nothing(length)
            self._meshes[()] = None

    def contribute(self, norms: Tensor) -> None:
        """Take in the norms of this rank's tensors, which follow one another share by share."""
        begin = 0
        for share in self._shares.shares:
            end = begin + len(share.tensors)
            if not share.partial:
                self._include(self.values, share, norms[begin:end])
            begin = end

    def contribute_everywhere(self, norms: Tensor) -> None:
        """Take in a number of this rank for each of its meshes."""
        for key, values in self.values.items():
            self.values[key] = self._combined(values, self._encoded(norms))

    def add_partial(self) -> None:
        """Add up what is partial over its ranks, and take in its norms."""
        for key in sorted(self.values):
            own = [share for share in self._shares.shares if share.mesh and share.mesh.key == key]
            for partial in sorted({share.partial for share in own if share.partial}):
                alike = [share for share in own if share.partial == partial]
                found: dict[tuple[Any, ...], Tensor] = {
                    key: self.exchange.nothing(len(self.values[key]))
                }
                for share, norms in zip(alike, self._added_up(alike), strict=True):
                    self._include(found, share, norms)
                reduced = [dimension.key for dimension in alike[0].partial_dimensions]
                self.exchange.over_meshes(found, reduced)
                self.values[key] = self._combined(self.values[key], found[key])

    def finished(self) -> tuple[Tensor, Tensor]:
        """The norms over all ranks: of each section, and of each gradient."""
        exchange = self.exchange
        buckets = [exchange.nothing(len(self._sections)) for _ in range(2 ** len(exchange.groups))]
        each = None
        for key, values in self.values.items():
            mesh = self._meshes[key]
            totals = self._totals(values) if self._has_each else values
            bits = exchange.bits_of(mesh)
            if not exchange.hands_on(mesh):
                totals = exchange.neutral(totals)
            buckets[bits] = self._combined(buckets[bits], totals)
            each = values if each is None else self._combined(each, values)
        exchange.over_groups(buckets)
        totals = buckets[0]
        for bucket in buckets[1:]:
            totals = self._combined(totals, bucket)
        is_count = self._norm_type == 0.0
        none = torch.zeros(0, dtype=torch.float64, device=exchange.device)
        return (
            totals if is_count else self._decoded(totals),
            self._decoded(each) if self._has_each and each is not None else none,
        )

    def _include(self, values: dict[tuple[Any, ...], Tensor], share: Share, norms: Tensor) -> None:
        exchange = self.exchange
        key = share.mesh.key if share.mesh is not None else ()
        encoded = self._encoded(norms)
        if self._norm_type < 0.0:
            # A part without elements has no smallest one, and its norm of 0 no power.
            empty = [tensor.numel() == 0 for tensor in share.tensors]
            is_empty = torch.tensor(empty, dtype=torch.bool, device=exchange.device)
            encoded = torch.where(is_empty, exchange.nothing(1), encoded)
        if not share.counts(exchange.bits_of(share.mesh), exchange.groups):
            encoded = exchange.neutral(encoded)
        if not self._has_each:
            reduced = encoded.max() if exchange.is_maximum else encoded.sum()
            encoded = reduced.reshape(1)
        elif share.places != list(range(self._shares.count)):
            places = torch.tensor(share.places, device=exchange.device)
            encoded = exchange.nothing(self._shares.count).index_copy(0, places, encoded)
        values[key] = self._combined(values[key], encoded)

    def _added_up(self, shares: Sequence[Share]) -> list[Tensor]:
        """The norms of gradients that are partial in the same dimensions of a mesh, share by share.

        They are added up over their ranks in one go for each of these dimensions and each dtype.
        """
        tensors = [tensor for share in shares for tensor in share.summands]
        factors = [share.average_factor for share in shares for _ in share.summands]
        norms = [torch.zeros((), dtype=torch.float64, device=self.exchange.device)] * len(tensors)
        dtypes = [summed_dtype(tensor.dtype) for tensor in tensors]
        if self.exchange.has_failed:
            # Others may not know, and what is wrong with these may be that they cannot be read.
            device = self.exchange.device
            tensors = [torch.zeros(t.shape, dtype=t.dtype, device=device) for t in tensors]
        for dtype in sorted(set(dtypes), key=str):
            places = [place for place, own in enumerate(dtypes) if own == dtype]
            flat = torch.cat([tensors[place].to(dtype).reshape(-1) for place in places])
            home = flat.device
            flat = flat.to(self.exchange.device)
            for dimension in shares[0].partial_dimensions:
                flat = torch_distributed.all_reduce(flat, "sum", dimension.group)
            split = torch.split(flat.to(home), [tensors[place].numel() for place in places])
            parts = [part * factors[place] for place, part in zip(places, split, strict=True)]
            native = _C.tensor_norms(parts, self._norm_type, torch.float64)
            found = native[1] if native else [tensor_norm(part, self._norm_type) for part in parts]
            for place, norm in zip(places, found, strict=True):
                norms[place] = norm.to(self.exchange.device)
        return list(torch.split(torch.stack(norms), [len(share.summands) for share in shares]))

    def _combined(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.maximum(one, other) if self.exchange.is_maximum else one + other

    def _totals(self, values: Tensor) -> Tensor:
        """The power sum of each section, from those of each gradient."""
        if self._norm_type == 0.0:
            # As torch, which takes the norm of the norms: how many are not 0.
            values = torch.where(values.isnan(), values, (values != 0.0).to(values.dtype))
        nothing = self.exchange.nothing(1)[0]
        totals = []
        for section in torch.split(values, list(self._sections)):
            if section.numel() == 0:
                totals.append(nothing)
            else:
                totals.append(section.max() if self.exchange.is_maximum else section.sum())
        return torch.stack(totals)

    def _encoded(self, norms: Tensor) -> Tensor:
        """Power sums; or bits of magnitudes, negative where the smallest has to be the largest."""
        norm_type = self._norm_type
        if self.exchange.is_maximum:
            # A number of their own for NaN, whose sign and payload may be any.
            bits = (norms + 0.0).view(torch.int64)
            bits = bits if norm_type > 0.0 else -bits
            return torch.where(norms.isnan(), NAN_BITS, bits)
        if norm_type == 2.0:
            return norms * norms
        return norms if norm_type in (0.0, 1.0) else norms.pow(norm_type)

    def _decoded(self, values: Tensor) -> Tensor:
        norm_type = self._norm_type
        if self.exchange.is_maximum:
            is_none = values == self.exchange.nothing(1)
            bits = values if norm_type > 0.0 else torch.where(values == NAN_BITS, values, -values)
            return torch.where(is_none, 0.0, torch.where(is_none, 0, bits).view(torch.float64))
        if norm_type == 2.0:
            return values.sqrt()
        if norm_type in (0.0, 1.0):
            return values
        # Without elements there is no power to take a root of.
        return torch.where(values == 0.0, 0.0, values.pow(1.0 / norm_type))
