"""Exact nearest neighbours among float32 features: a fast pass that selects, and a direct distance that decides.

The fast pass works with *lower bounds* of distances that are proven (:class:`FloatScan`, :class:`QuantisedScan`). For
each query the references with the least bounds are kept and their distances computed directly in float64, so nothing
cancels. If the n-th of these distances lies below every bound that was dropped, no neighbour was lost. If not, the
query is searched again: every reference whose bound does not exceed that n-th distance is computed directly.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from unrote.neighbours.direct import least, rounding, squared_distances
from unrote.neighbours.feature_scans import RangeScan, checked
from unrote.neighbours.found import MEMORY_BYTES, Neighbours
from unrote.neighbours.passes import WAYS, Passes, slots_of
from unrote.neighbours.products import float32_products
from unrote.neighbours.streaming import Blocks, Rows, Saved, Stream, release
from unrote.ranks import Ranks

FEW = 1.3  # candidates per neighbour that float64 tells apart sooner than float32 and float64 do


@torch.no_grad()
def nearest_features(
    queries: Rows,
    references: Rows,
    num: int,
    *,
    memory_bytes: int = MEMORY_BYTES,
    device: str | torch.device = "cpu",
    distributed: bool = False,
    resume: Path | None = None,
    progress: str | None = None,
) -> Neighbours:
    """The ``num`` nearest references of every query by L2 distance, as brute force in float64 would find them.

    Args:
        queries: float32 [G, D], finite.
        references: float32 [N, D], finite; read in order, once per group of queries that fits the memory (and again
            for queries that the fast pass cannot settle).
        num: how many neighbours; at most N are returned. Ties go to the lower index.
        memory_bytes: bound on the working memory (on top of the result); decides the block sizes, never the result.
        device: where the fast pass is computed.
        distributed: every process of the initialized ``torch.distributed`` group calls this with the same arguments and
            reads its share of the references (and the candidates); all get the same result.
        resume: folder that keeps the progress of a long search under a hash of its content.
        progress: label of a progress bar on stderr; None for no bar.

    Returns:
        Neighbours with arrays [G, min(num, N)]; squared distances float64, no transforms (all 0), unit 1.

    Raises:
        InputError: values that are not finite, other than float32, or more values than the bound is proven for.
    """
    assert queries.shape[1:] == references.shape[1:] and len(references) > 0 and num > 0
    num, count, values = min(num, len(references)), len(references), references.shape[1]
    sizes = Blocks.within(memory_bytes, values, slots_of("bfloat16", num, count), 8, 10)
    ranks, device = Ranks.here(distributed=distributed), torch.device(device)
    saved = Saved.keyed(resume, ranks, queries, references, "features/5", num, sizes.group)
    groups = range(0, len(queries), sizes.group)
    squared, indices = np.zeros((len(queries), num)), np.zeros((len(queries), num), dtype=np.int64)
    again = 0
    # The bounds are of float32 products.
    with (
        torch.autocast("cpu", enabled=False),
        float32_products("highest"),
        ranks.bar(progress, "row", len(groups), count) as bar,
    ):
        stream = Stream(references, sizes.block, ranks, saved, bar)
        for start in groups:
            group = slice(start, start + sizes.group)
            search = _Group(checked(np.array(queries[group])), stream, num, sizes.tile, device, str(start))
            release(queries)
            squared[group], indices[group] = search.run()
            again += search.searched_again
    return Neighbours(squared, indices, np.zeros(indices.shape, dtype=np.int16), 1.0, again)


class _Group:
    """The search for one group of queries float32 [g, D]."""

    def __init__(
        self,
        queries: np.ndarray,
        stream: Stream,
        num: int,
        tile: int,
        device: torch.device,
        name: str,
    ):
        self.queries, self.stream, self.num, self.tile = queries, stream, num, tile
        self.device, self.name = device, name
        self.references, self.count = stream.references, len(stream.references)
        self.searched_again = 0

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances float64 and indices int64, each [g, num]."""
        passes = Passes(self.queries, self.references, self.num, self.stream.block, self.device)
        # Processes need not find the same: the first decides.
        found = {"way": np.array([WAYS.index(passes.fastest())])}
        way = WAYS[int(next(self.stream.ranks.shares(found))["way"][0])]
        scan = passes.scan(way, self.queries, self.num, slots_of(way, self.num, self.count), self.tile)
        self.stream.run(f"{way}-{self.name}", scan)
        bounds, candidates = (part.cpu().numpy() for part in scan.candidates())
        squared, indices = self._decide(bounds, candidates)
        dropped = bounds[:, -1] if bounds.shape[1] < self.count else np.full(len(bounds), np.inf)
        # A bound is safe by itself; the factor is for the root and for the float64 sum of the direct distance.
        lost = np.flatnonzero(~(np.sqrt(squared[:, -1]) * (1 + 1e-9) < dropped))
        self.searched_again = len(lost)
        if len(lost):
            # Few are compared sooner than all references are reduced again.
            reduction = passes.reduction if way == "reduced" and len(lost) > passes.reduction.values else None
            again = RangeScan(self.queries[lost], squared[lost, -1], self.num, self.tile, self.device, reduction)
            what = hashlib.sha256(lost.tobytes() + squared[lost, -1].tobytes()).hexdigest()[:16]
            self.stream.run(f"RangeScan-{self.name}-{what}", again)
            squared[lost], indices[lost] = again.squared, again.indices
        return squared, indices

    def _decide(self, bounds: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ``num`` nearest of the candidates; processes share the queries, as all have the same candidates."""
        ranks = self.stream.ranks
        squared, indices = np.zeros((len(bounds), self.num)), np.zeros((len(bounds), self.num), dtype=np.int64)
        mine = ranks.span(len(bounds))
        rows = slice(mine.start, mine.stop)
        squared[rows], indices[rows] = self._nearest(mine, bounds[rows], candidates[rows])
        for rank, share in enumerate(ranks.shares({"squared": squared, "indices": indices})):
            span = Ranks(rank, ranks.world).span(len(bounds))
            theirs = slice(span.start, span.stop)
            squared[theirs], indices[theirs] = share["squared"][theirs], share["indices"][theirs]
        return squared, indices

    def _nearest(self, span: range, bounds: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Float32 tells most of them apart, and float64 the rest: all, if they are few anyway."""
        low, high = np.where(bounds < np.inf, 0.0, np.inf), np.full(bounds.shape, np.inf)
        farthest = np.full(len(bounds), np.inf)
        many = (bounds < np.inf).sum() > FEW * self.num * len(bounds)
        # Some at a time: each time fewer of the rest can be as near as the farthest that is kept.
        for start in range(0, bounds.shape[1] if many else 0, self.num):
            part = bounds[:, start : start + self.num]
            places, columns = np.nonzero((part <= np.sqrt(farthest)[:, None] * (1 + 1e-9)) & (part < np.inf))
            columns += start
            squared = self._squared(places + span.start, candidates[places, columns], np.float32)
            low[places, columns], high[places, columns] = rounding(squared, self.queries.shape[1])
            farthest = np.partition(high, self.num - 1)[:, self.num - 1]
        places, columns = np.nonzero((low <= farthest[:, None]) & (low < np.inf))
        rows, indices = places + span.start, candidates[places, columns]
        none = (rows[:0], np.empty(0), indices[:0])
        _, squared, indices = least(none, (rows, self._squared(rows, indices, np.float64), indices), self.num)
        return squared.reshape(-1, self.num), indices.reshape(-1, self.num)

    def _squared(self, rows: np.ndarray, indices: np.ndarray, dtype: type[np.float32] | type[np.float64]) -> np.ndarray:
        return squared_distances(self.queries, self.references, rows, indices, dtype)
