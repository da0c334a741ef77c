"""Which fast pass over features pays, by a sample: a guess about speed that never changes a result."""

from functools import cached_property
from typing import Literal

import numpy as np
import torch

from unrote.neighbours.cascade import CascadeScan
from unrote.neighbours.feature_scans import FloatScan, QuantisedScan, bounding_box, checked, widest
from unrote.neighbours.products import bfloat16_pays, int8_is_exact
from unrote.neighbours.reduction import Reduction
from unrote.neighbours.streaming import Rows, release

Way = Literal["int8", "reduced", "bfloat16", "float32"]
WAYS: tuple[Way, ...] = ("int8", "reduced", "bfloat16", "float32")
# Candidates kept per neighbour asked for (and 16 more): the coarser the bounds, the more references they cannot tell.
KEPT = {"int8": 3.5, "reduced": 1.5, "bfloat16": 4.0, "float32": 1.5}
SAMPLE, RUN = 2048, 128  # references looked at, and how many of them lie together
FITTED, TRIED = 512, 64  # queries that a reduction is fitted to, and that a pass is tried on


def slots_of(way: Way, num: int, count: int) -> int:
    """How many candidates a scan keeps for each query."""
    return min(int(KEPT[way] * num) + 16, count)


class Passes:
    """The passes there are for some queries and references.

    Args:
        queries: float32 [g, D], finite.
        references: float32 [N, D].
        num: neighbours asked for.
        most: how many references may be read at once.
        device: where products are computed.

    Raises:
        InputError: the references looked at are not finite, or not float32.
    """

    def __init__(self, queries: np.ndarray, references: Rows, num: int, most: int, device: torch.device):
        self.queries, self.num, self.count, self.most, self.device = queries, num, len(references), most, device
        runs = max(1, min(SAMPLE, most) // RUN)
        starts = np.linspace(0, max(0, self.count - RUN), 2 * runs).astype(np.int64)
        parts = [checked(np.array(references[start : start + RUN])) for start in starts]
        release(references)
        self.shown, self.sample = np.concatenate(parts[::2]), np.concatenate(parts[1::2])
        numbers = [np.arange(start, start + len(part)) for start, part in zip(starts, parts, strict=True)]
        self.numbers = np.concatenate(numbers[::2] + numbers[1::2])  # of those shown, then of the sample
        self.box = bounding_box(queries, self.sample)

    @cached_property
    def reduction(self) -> Reduction:
        """By queries and by other references than those that it is tried on, which it would fit too well."""
        some = self.queries[:: -(-len(self.queries) // FITTED)]
        return Reduction(np.concatenate([self.shown[::2], some]), self.device)

    def there(self, way: Way) -> bool:
        """Whether this machine and these values have that pass."""
        kind, sizes = self.device.type, (len(self.queries), self.count, self.queries.shape[1])
        if way == "float32":
            return True
        if not 1e-30 < widest(self.box) < 1e30:
            return False
        # Only what is asked for: the checks and the reduction take time.
        match way:
            case "int8":
                return int8_is_exact(kind)
            case "reduced":
                return Reduction.pays(*sizes) and self.reduction.usable
            case "bfloat16":
                return bfloat16_pays(kind)

    def fastest(self) -> Way:
        """The first that pays: so few references lie within the error of its bounds that the slots hold them."""
        some = self.queries[np.linspace(0, len(self.queries) - 1, TRIED).astype(np.int64)]
        rank = min(len(self.sample), max(16, self.num * len(self.sample) // self.count))
        centre = self.queries.mean(0)
        pairs = torch.cdist(torch.from_numpy(some - centre), torch.from_numpy(self.sample - centre))
        distances = pairs.kthvalue(rank).values
        half, kind = len(self.sample) // 4, self.device.type
        for way in WAYS[:-1]:
            if not self.there(way):
                continue
            if way == "reduced" and kind == "cpu":
                cascade = CascadeScan(some, self.box, rank, rank, self.count, 4 * len(some), self.reduction)
                if cascade.work(self.sample, distances) < (0.5 if bfloat16_pays(kind) else 1.0):
                    return way
                continue
            trial = self.scan(way, some, rank, slots_of(way, rank, len(self.sample)), len(some))
            for start in (0, half):  # the first part gives the second its limits
                trial.add(start, self.sample[start : half if start == 0 else None])
            within = (trial.candidates()[0].cpu() <= distances[:, None]).sum(1).double().median()
            if float(within) <= 0.7 * KEPT[way] * rank:
                return way
        return "float32"

    def scan(
        self, way: Way, queries: np.ndarray, num: int, slots: int, tile: int
    ) -> FloatScan | QuantisedScan | CascadeScan:
        """The pass that is called so, of some of the queries."""
        if way == "int8":
            return QuantisedScan(queries, self.box, num, slots, self.count, tile, self.device)
        if way == "reduced" and self.device.type == "cpu":
            cascade = CascadeScan(queries, self.box, num, slots, self.count, tile, self.reduction)
            # Near the ends of the references the same may have been looked at twice.
            once = np.unique(self.numbers, return_index=True)[1]
            some = once[:: -(-len(once) // self.most)]
            cascade.expect(np.concatenate([self.shown, self.sample])[some])
            return cascade
        coarse, reduction = way == "bfloat16", self.reduction if way == "reduced" else None
        return FloatScan(
            queries, self.box, slots, self.count, tile=tile, device=self.device, coarse=coarse, reduction=reduction
        )
