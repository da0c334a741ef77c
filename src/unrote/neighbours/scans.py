"""One pass over the references for a group of queries: distances of a tile at a time, the nearest kept.

A scan is fed blocks of references in any number of pieces and keeps, per query, the least keys. Its state can be saved,
loaded, and merged with the state of a scan of other references; what order or grouping they came in changes nothing.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from unrote.errors import InputError
from unrote.neighbours.products import EXACT_CHUNK, integer_norms, integer_product, squared_dtype
from unrote.neighbours.running_top import EMPTY, RunningTop, below

State = dict[str, np.ndarray]


class Scan(Protocol):
    """What :mod:`unrote.neighbours.streaming` drives."""

    def add(self, first: int, references: np.ndarray) -> None:
        """Take in the rows that start at index ``first``."""

    def state(self) -> State:
        """All that was learnt, as arrays whose shapes do not depend on which references were seen."""

    def merge(self, state: State) -> None:
        """Add what another scan of the same queries learnt from other references."""


class IntegerScan:
    """The ``slots`` nearest of N references by exact squared distance of 8-bit vectors, least over an orbit of views.

    Args:
        queries: int8 [g, D].
        slots: how many to keep per query.
        num_references: N.
        views: int64 [T, D]: for each value of a view, the index of the value of the reference it comes from.
        num: with ``slack``, the rank whose distance the slack is measured from.
        tile: how many queries at once.

    Attributes:
        norms: squared norms of the queries, int64 [g].
    """

    def __init__(
        self,
        queries: Tensor,
        slots: int,
        num_references: int,
        *,
        views: Tensor | None = None,
        num: int | None = None,
        tile: int = 2048,
    ):
        values = queries.shape[1]
        self.queries, self.tile, self.num = queries, tile, num or slots
        self.num_references, self.num_views = num_references, 1 if views is None else len(views)
        self.stride = self.num_references * self.num_views
        if values * 255**2 * self.stride >= EMPTY:
            raise InputError(
                f"{num_references} references of {values} values under {self.num_views} transforms are more than "
                "one search can number in 64 bits: audit parts of the training set, or search fewer transforms"
            )
        self.dtype = squared_dtype(values)
        self.views = views if self.num_views > 1 else None
        if self.views is not None:
            # Reflection repeats some pixels and drops others, so each view has its own norm: a count of uses.
            self.uses = torch.stack([torch.bincount(view, minlength=values) for view in self.views]).double()
        self.norms = integer_norms(queries)
        self.top = RunningTop(len(queries), slots, queries.device)

    def add(self, first: int, references: np.ndarray) -> None:
        """Take in uint8 rows [b, ...]."""
        self.add_signed(first, signed(references).to(self.queries.device))

    def add_signed(self, first: int, references: Tensor, slack: Tensor | None = None) -> None:
        """Take in int8 rows [b, D].

        With ``slack`` [g], rows are not kept whose distance (not squared) exceeds that of the ``num``-th row kept so
        far by more than the slack.
        """
        columns, norms = self._columns(references)
        for start in range(0, len(self.queries), self.tile):
            rows = slice(start, min(start + self.tile, len(self.queries)))
            scores, which = self._scores(rows, columns, norms)
            self._keep(rows, first, scores, which, self._limits(rows, None if slack is None else slack[rows]))

    def _columns(self, references: Tensor) -> tuple[Tensor, Tensor]:
        """The block as columns [D, b], and the squared norms of its views [T, b]."""
        if self.views is None:
            return references.T, integer_norms(references)[None].to(self.dtype)
        columns = references.T.contiguous()  # a view is then a gather of rows
        norms = torch.zeros((self.num_views, columns.shape[1]), dtype=torch.float64, device=columns.device)
        for start in range(0, len(columns), EXACT_CHUNK):
            chunk = slice(start, start + EXACT_CHUNK)
            norms += self.uses[:, chunk] @ columns[chunk].double().square_()
        return columns, norms.to(self.dtype)

    def _scores(self, rows: slice, columns: Tensor, norms: Tensor) -> tuple[Tensor, Tensor | None]:
        """‖reference‖² − 2 · dot product, the least over the views, and which view that is."""
        queries = self.queries[rows]
        if self.views is None:
            dots = integer_product(queries, columns, self.dtype)
            return torch.add(norms[0], dots, alpha=-2, out=dots), None
        best = which = None
        for index, view in enumerate(self.views):
            dots = integer_product(queries, columns[view], self.dtype)
            scores = torch.add(norms[index], dots, alpha=-2, out=dots)
            if best is None or which is None:
                best, which = scores, torch.zeros(scores.shape, dtype=torch.int16, device=scores.device)
                continue
            which.masked_fill_(scores < best, index)
            torch.minimum(best, scores, out=best)
        assert best is not None
        return best, which

    def _limits(self, rows: slice, slack: Tensor | None) -> Tensor:
        """Scores from which on nothing is kept."""
        keys = self.top.keys[rows]
        limits = keys[:, -1] // self.stride
        if slack is not None:
            distances = (keys[:, self.num - 1] // self.stride).double().sqrt()
            allowed = (distances + slack).square_().mul_(1 + 1e-9).add_(1.0)  # rounding of the root, and "up to"
            limits = torch.minimum(limits.double(), allowed).long()
        greatest = torch.iinfo(self.dtype).max
        return (limits - self.norms[rows]).clamp_(-greatest, greatest).to(self.dtype)

    def _keep(self, rows: slice, first: int, scores: Tensor, which: Tensor | None, limits: Tensor) -> None:
        found = below(scores, limits)
        if found is None:
            keys = scores.long().add_(self.norms[rows, None]).mul_(self.num_references)
            keys.add_(torch.arange(first, first + keys.shape[1], device=keys.device)).mul_(self.num_views)
            self.top.add_all(rows, keys if which is None else keys.add_(which))
            return
        places, columns = found
        queries = places + rows.start
        keys = (scores[places, columns].long() + self.norms[queries]) * self.num_references + first + columns
        keys = keys * self.num_views + (0 if which is None else which[places, columns])
        self.top.add_some(queries, keys)

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Squared distances, indices, views, and whether there is anything: int64 ×3 and bool, each [g, slots]."""
        keys = self.top.keys
        pairs = keys // self.num_views
        return pairs // self.num_references, pairs % self.num_references, keys % self.num_views, keys != EMPTY

    def state(self) -> State:
        """The keys."""
        return {"keys": self.top.keys.cpu().numpy()}

    def merge(self, state: State) -> None:
        """Keep the least of both."""
        self.top.add_all(slice(None), torch.from_numpy(state["keys"]).to(self.top.keys.device))


def signed(images: np.ndarray) -> Tensor:
    """Pixels minus 128, flattened: int8 [n, D] of uint8 [n, ...]."""
    flat = np.bitwise_xor(images, np.uint8(128)).reshape(len(images), -1)
    return torch.from_numpy(flat.view(np.int8))
