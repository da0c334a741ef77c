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

from unrote.neighbours.direct import least, squared_distances
from unrote.neighbours.feature_scans import FloatScan, QuantisedScan, RangeScan, bounding_box, checked, widest
from unrote.neighbours.images import MEMORY_BYTES, Neighbours
from unrote.neighbours.products import float32_products, int8_is_exact, integer_norms, integer_product, squared_dtype
from unrote.neighbours.streaming import Blocks, Ranks, Rows, Saved, Stream, release


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
    slots = min(3 * num + 16, count)
    sizes = Blocks.within(memory_bytes, values, slots, 8, 10)
    ranks, device = Ranks.here(distributed=distributed), torch.device(device)
    saved = Saved.keyed(resume, ranks, queries, references, "features/1", num, sizes.group)
    groups = range(0, len(queries), sizes.group)
    squared, indices = np.zeros((len(queries), num)), np.zeros((len(queries), num), dtype=np.int64)
    again = 0
    # The bound is one of float32 products.
    with float32_products("highest"), ranks.bar(progress, "row", len(groups), count) as bar:
        stream = Stream(references, sizes.block, ranks, saved, bar)
        for start in groups:
            group = slice(start, start + sizes.group)
            search = _Group(checked(np.array(queries[group])), stream, num, slots, sizes.tile, device, str(start))
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
        slots: int,
        tile: int,
        device: torch.device,
        name: str,
    ):
        self.queries, self.stream, self.num, self.slots, self.tile = queries, stream, num, slots, tile
        self.device, self.name = device, name
        self.references, self.count = stream.references, len(stream.references)
        self.searched_again = 0

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances float64 and indices int64, each [g, num]."""
        scan = self._fast_scan()
        self.stream.run(f"{type(scan).__name__}-{self.name}", scan)
        bounds, candidates = (part.cpu().numpy() for part in scan.candidates())
        squared, indices = self._decide(bounds, candidates)
        dropped = bounds[:, -1] if self.slots < self.count else np.full(len(bounds), np.inf)
        # A bound is safe by itself; the factor is for the root and for the float64 sum of the direct distance.
        lost = np.flatnonzero(~(np.sqrt(squared[:, -1]) * (1 + 1e-9) < dropped))
        self.searched_again = len(lost)
        if len(lost):
            again = RangeScan(self.queries[lost], squared[lost, -1], self.num, self.count, self.tile, self.device)
            what = hashlib.sha256(lost.tobytes() + squared[lost, -1].tobytes()).hexdigest()[:16]
            self.stream.run(f"RangeScan-{self.name}-{what}", again)
            squared[lost], indices[lost] = again.squared, again.indices
        return squared, indices

    def _fast_scan(self) -> FloatScan | QuantisedScan:
        box = box_for_quantising(self.queries, self.references, self.num, self.slots, self.device)
        if box is None:
            self.slots = min(self.slots, self.num + self.num // 2 + 16)  # its bounds are far tighter
            return FloatScan(self.queries, self.slots, self.count, tile=self.tile, device=self.device)
        return QuantisedScan(self.queries, box, self.num, self.slots, self.count, self.tile, self.device)

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
        rows = np.repeat(np.arange(span.start, span.stop), self.num)
        first = candidates[:, : self.num].reshape(-1)
        found = (rows, self._squared(rows, first), first)
        farthest = np.sqrt(found[1].reshape(-1, self.num).max(1, initial=0.0)) * (1 + 1e-9)
        places, columns = np.nonzero(bounds[:, self.num :] <= farthest[:, None])
        more = candidates[places, columns + self.num]
        rows = places + span.start
        _, squared, indices = least(found, (rows, self._squared(rows, more), more), self.num)
        return squared.reshape(-1, self.num), indices.reshape(-1, self.num)

    def _squared(self, rows: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return squared_distances(self.queries, self.references, rows, indices)


def box_for_quantising(
    queries: np.ndarray, references: Rows, num: int, slots: int, device: torch.device
) -> np.ndarray | None:
    """The box of a :class:`QuantisedScan` if one pays: a guess from a sample, about speed only.

    It pays if so few references lie within the error of 8 bits that the slots hold them.
    """
    if not int8_is_exact(device.type):
        return None
    count = len(references)
    starts = np.linspace(0, max(0, count - 128), 16).astype(np.int64)
    sample = checked(np.concatenate([references[start : start + 128] for start in starts]))
    release(references)
    box = bounding_box(queries, sample)
    if not 1e-30 < widest(box) < 1e30:
        return None
    some = queries[np.linspace(0, len(queries) - 1, 64).astype(np.int64)]
    scan = QuantisedScan(some, box, 1, 1, count, len(some), device)
    rounded, errors = scan.rounded(sample)
    dots = integer_product(scan.scan.queries, rounded.T, squared_dtype(rounded.shape[1]))
    distances = (integer_norms(rounded) + scan.scan.norms[:, None] - 2 * dots).double().sqrt_()
    rank = min(len(sample), max(16, num * len(sample) // count))
    within = distances.kthvalue(rank, dim=1, keepdim=True).values + 2 * (scan.errors[:, None] + errors[0].max())
    growth = float((distances <= within).sum(1).double().median()) / rank
    return box if growth * num <= 0.7 * slots else None
