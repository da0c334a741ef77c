"""Exact nearest neighbours among float32 features: a fast pass that selects, and a direct distance that decides.

The fast pass works with *lower bounds* of distances that are proven (:class:`FloatScan`, :class:`QuantisedScan`). For
each query the references with the least bounds are kept and their distances computed directly in float64, so nothing
cancels. If the n-th of these distances lies below every bound that was dropped, no neighbour was lost. If not, the
query is searched again: every reference whose bound does not exceed that n-th distance is computed directly.
"""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from unrote.neighbours.direct import least, squared_distances
from unrote.neighbours.feature_scans import FloatScan, QuantisedScan, RangeScan, bounding_box, checked, widest
from unrote.neighbours.images import MEMORY_BYTES, Neighbours
from unrote.neighbours.products import bfloat16_pays, float32_products, int8_is_exact
from unrote.neighbours.streaming import Blocks, Rows, Saved, Stream, release
from unrote.ranks import Ranks

Way = Literal["int8", "bfloat16", "float32"]
WAYS: tuple[Way, ...] = ("int8", "bfloat16", "float32")
# Candidates kept per neighbour asked for (and 16 more): the coarser the bounds, the more references they cannot tell.
KEPT = {"int8": 3.5, "bfloat16": 4.0, "float32": 1.5}


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
    saved = Saved.keyed(resume, ranks, queries, references, "features/3", num, sizes.group)
    groups = range(0, len(queries), sizes.group)
    squared, indices = np.zeros((len(queries), num)), np.zeros((len(queries), num), dtype=np.int64)
    again = 0
    # The bound is one of float32 products.
    with float32_products("highest"), ranks.bar(progress, "row", len(groups), count) as bar:
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
        way, box = fast_way(self.queries, self.references, self.num, self.device)
        # Processes need not find the same: the first decides.
        way = WAYS[int(next(self.stream.ranks.shares({"way": np.array([WAYS.index(way)])}))["way"][0])]
        slots = slots_of(way, self.num, self.count)
        scan = scan_of(way, self.queries, box, self.num, slots, self.count, self.tile, self.device)
        self.stream.run(f"{way}-{self.name}", scan)
        bounds, candidates = (part.cpu().numpy() for part in scan.candidates())
        squared, indices = self._decide(bounds, candidates)
        dropped = bounds[:, -1] if bounds.shape[1] < self.count else np.full(len(bounds), np.inf)
        # A bound is safe by itself; the factor is for the root and for the float64 sum of the direct distance.
        lost = np.flatnonzero(~(np.sqrt(squared[:, -1]) * (1 + 1e-9) < dropped))
        self.searched_again = len(lost)
        if len(lost):
            again = RangeScan(self.queries[lost], squared[lost, -1], self.num, self.tile, self.device)
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


def slots_of(way: Way, num: int, count: int) -> int:
    """How many candidates a scan keeps for each query."""
    return min(int(KEPT[way] * num) + 16, count)


def scan_of(
    way: Way, queries: np.ndarray, box: np.ndarray, num: int, slots: int, count: int, tile: int, device: torch.device
) -> FloatScan | QuantisedScan:
    """The scan that is called so."""
    if way == "int8":
        return QuantisedScan(queries, box, num, slots, count, tile, device)
    return FloatScan(queries, box, slots, count, tile=tile, device=device, coarse=way == "bfloat16")


def fast_way(queries: np.ndarray, references: Rows, num: int, device: torch.device) -> tuple[Way, np.ndarray]:
    """The fastest pass that pays, and a box for it: a guess from a sample, about speed only.

    A pass pays if so few references lie within the error of its rounding that the slots hold them.
    """
    count = len(references)
    starts = np.linspace(0, max(0, count - 128), 16).astype(np.int64)
    sample = checked(np.concatenate([references[start : start + 128] for start in starts]))
    release(references)
    box = bounding_box(queries, sample)
    there = {"int8": int8_is_exact(device.type), "bfloat16": bfloat16_pays(device.type)}
    if not 1e-30 < widest(box) < 1e30:
        return "float32", box
    some = queries[np.linspace(0, len(queries) - 1, 64).astype(np.int64)]
    rank = min(len(sample), max(16, num * len(sample) // count))
    centre = queries.mean(0)
    pairs = torch.cdist(torch.from_numpy(some - centre), torch.from_numpy(sample - centre))
    distances = pairs.kthvalue(rank).values
    for way in WAYS[:2]:
        if there[way]:
            slots = min(int(KEPT[way] * rank) + 16, len(sample))
            trial = scan_of(way, some, box, rank, slots, count, len(some), device)
            for start in (0, len(sample) // 4):  # the first part gives the second its limits
                trial.add(start, sample[start : len(sample) // 4 if start == 0 else None])
            within = (trial.candidates()[0].cpu() <= distances[:, None]).sum(1).double().median()
            if float(within) <= 0.7 * KEPT[way] * rank:
                return way, box
    return "float32", box
