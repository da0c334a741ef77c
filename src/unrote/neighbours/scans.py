"""One pass over the references for a group of queries: distances of a tile at a time, the nearest kept.

A scan is fed blocks of references in any number of pieces and keeps, per query, the least keys. Its state can be saved,
loaded, and merged with the state of a scan of other references; what order or grouping they came in changes nothing.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from unrote.errors import InputError
from unrote.neighbours.orbit import IDENTITY, Transform
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
    """The ``slots`` nearest of N images by exact squared distance, least over an orbit of views.

    Args:
        queries: uint8 [g, H, W, C].
        slots: how many to keep per query.
        num_references: N.
        views: the orbit; of equally near views the first counts.
        margin: pixels at each border that are left out.
        num: with ``allowed``, the rank whose distance it is given; ``slots`` if None.
        tile: how many queries at once.
        device: where products are computed.

    Attributes:
        norms: squared norms of the queries, int64 [g].
    """

    def __init__(
        self,
        queries: np.ndarray,
        slots: int,
        num_references: int,
        *,
        views: Sequence[Transform] = (IDENTITY,),
        margin: int = 0,
        num: int | None = None,
        tile: int,
        device: torch.device,
    ):
        values, self.num = int(np.prod(queries.shape[1:])), num or slots
        self.num_references, self.num_views, self.tile = num_references, len(views), tile
        self.stride = self.num_references * self.num_views
        if values * 255**2 * self.stride >= EMPTY:
            raise InputError(
                f"{num_references} references of {values} values under {self.num_views} transforms are more than "
                "one search can number in 64 bits: audit parts of the training set, or search fewer transforms"
            )
        self.dtype = squared_dtype(values)
        height, width = queries.shape[1:3]
        inside = np.arange(values).reshape(queries.shape[1:])[margin : height - margin, margin : width - margin]
        compared = torch.from_numpy(inside.reshape(-1).copy())
        self.queries = signed(queries)[:, compared].to(device)
        self._as_it_is = margin == 0 and views[0] == views[0].unmoved
        self.norms = integer_norms(self.queries)
        self.top = RunningTop(len(queries), slots, device)
        self._products = torch.empty((1, 0), dtype=self.dtype, device=device)
        # Every view shows the values of one of these, moved.
        self.bases = list(dict.fromkeys(view.unmoved for view in views))
        self.base_of = [self.bases.index(view.unmoved) for view in views]
        sources = [view.source_pixels(*queries.shape[1:]) for view in views]
        self.sources = [torch.from_numpy(source)[compared].to(device) for source in sources]
        # Reflection repeats some pixels and drops others, so each view has its own norm: a count of uses.
        self.uses = torch.stack([torch.bincount(s, minlength=values).to(torch.int8) for s in self.sources])

    def add(self, first: int, references: np.ndarray, allowed: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take in uint8 rows [b, H, W, C].

        With ``allowed``, rows are not kept whose squared distance exceeds what it gives, float64, for the distances
        (not squared) of the ``num``-th row kept so far.
        """
        bases, norms = self._columns(references)
        for start in range(0, len(self.queries), self.tile):
            rows = slice(start, min(start + self.tile, len(self.queries)))
            scores, which = self._scores(rows, bases, norms)
            self._keep(rows, first, scores, which, self._limits(rows, allowed))

    def _columns(self, references: np.ndarray) -> tuple[list[Tensor], Tensor]:
        """The block under each base as int8 columns [D, b], and the squared norms of all its views [T, b]."""
        device = self.queries.device
        if self.num_views == 1:
            rows = signed(self.bases[0].apply(references)).to(device)
            if not self._as_it_is:
                rows = rows[:, self.sources[0]]
            return [rows.T], integer_norms(rows)[None].to(self.dtype)
        bases = []
        norms = torch.zeros((self.num_views, len(references)), dtype=torch.float64, device=device)
        for number, base in enumerate(self.bases):
            columns = signed(base.apply(references)).to(device).T.contiguous()  # a view is then a gather of rows
            views = torch.tensor([view for view, its in enumerate(self.base_of) if its == number], device=device)
            for start in range(0, len(columns), EXACT_CHUNK):
                chunk = slice(start, start + EXACT_CHUNK)
                norms[views] += self.uses[views, chunk].double() @ columns[chunk].double().square_()
            bases.append(columns)
        return bases, norms.to(self.dtype)

    def _scores(self, rows: slice, bases: list[Tensor], norms: Tensor) -> tuple[Tensor, Tensor | None]:
        """‖reference‖² − 2 · dot product, the least over the views, and which view that is."""
        queries = self.queries[rows]
        best = which = None
        size = len(queries) * norms.shape[1]
        if self._products.shape[1] < size:
            # Kept, as fresh memory costs an eighth of the product: one for the least, one for the current view.
            self._products = torch.empty((min(2, self.num_views), size), dtype=self.dtype, device=queries.device)
        for index, (base, source) in enumerate(zip(self.base_of, self.sources, strict=True)):
            columns = bases[base] if self.num_views == 1 else bases[base][source]
            product = self._products[min(index, 1), :size].view(len(queries), -1)
            dots = integer_product(queries, columns, self.dtype, product)
            scores = torch.add(norms[index], dots, alpha=-2, out=dots)
            if best is None:
                best = scores
                continue
            if which is None:
                which = torch.zeros(scores.shape, dtype=torch.int16, device=scores.device)
            which.masked_fill_(scores < best, index)
            torch.minimum(best, scores, out=best)
        assert best is not None
        return best, which

    def _limits(self, rows: slice, allowed: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Scores from which on nothing is kept."""
        keys = self.top.keys[rows]
        limits = (keys[:, -1] // self.stride).double()  # exact up to 2⁵³, far above any distance
        if allowed is not None:
            distances = (keys[:, self.num - 1] // self.stride).double().sqrt()
            limits = torch.minimum(limits, allowed(distances).mul_(1 + 1e-9).add_(1.0))  # roots round, and "up to"
        greatest = min(torch.iinfo(self.dtype).max, 1 << 62)
        return limits.sub_(self.norms[rows]).clamp_(-greatest, greatest).to(self.dtype)

    def _keep(self, rows: slice, first: int, scores: Tensor, which: Tensor | None, limits: Tensor) -> None:
        found = below(scores, limits)
        if found is None:
            for part in self.top.parts(rows, scores):
                inside = slice(part.start - rows.start, part.stop - rows.start)
                keys = scores[inside].long().add_(self.norms[part, None]).mul_(self.num_references)
                keys.add_(torch.arange(first, first + keys.shape[1], device=keys.device)).mul_(self.num_views)
                self.top.add_all(part, keys if which is None else keys.add_(which[inside]))
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
