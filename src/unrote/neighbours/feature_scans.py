"""Scans of float32 features: bounds of distances from below that are proven, so that what they drop is known."""

import numpy as np
import torch
from torch import Tensor

from unrote.errors import InputError
from unrote.neighbours.direct import least, squared_distances
from unrote.neighbours.running_top import EMPTY, RunningTop, below
from unrote.neighbours.scans import IntegerScan, State


class FloatScan:
    """The ``slots`` references with the least *lower bounds* of their distance to float32 queries.

    The bound. Let u = 2⁻²³ (twice the unit roundoff of float32, so that truncating adders are covered) and q, r the
    centred rows. A float32 dot product summed in any order is off by at most γ‖q‖‖r‖ with γ = Du / (1 − Du); rounding
    the centred rows, the norms and three additions adds at most 16u(‖q‖² + ‖r‖²). As 2‖q‖‖r‖ ≤ ‖q‖² + ‖r‖²,
    ‖q − r‖² ≥ (1 − c)(‖q‖² + ‖r‖²) − 2 fl(q·r) with c = γ + 16u. Rows are scaled by a power of two so that the largest
    query value is about 1, and products that underflow are covered by D · 2⁻¹²⁴.
    """

    def __init__(self, queries: np.ndarray, slots: int, num_references: int, *, tile: int, device: torch.device):
        self.centre = torch.from_numpy(queries).mean(0, dtype=torch.float64).float().numpy()
        largest = float(np.abs(bounding_box(queries).astype(np.float64) - self.centre).max())
        self.scale = 2.0 ** -int(np.clip(np.ceil(np.log2(largest)), -126, 126)) if largest > 0 else 1.0
        values = queries.shape[1]
        rounding = values * 2.0**-23
        if rounding > 0.25:
            raise InputError(f"features have {values} values; the search is proven for up to {2**21}")
        if num_references > 2**32:
            raise InputError(f"{num_references} references are more than one search numbers: search parts of them")
        self.error = rounding / (1 - rounding) + 16 * 2.0**-23
        self.underflow = values * 2.0**-124
        self.tile, self.num_references = tile, num_references
        self.queries = self.prepared(queries, device)
        self.norms = shrunk_norms(self.queries, self.error)
        self.top = RunningTop(len(queries), slots, device)

    def prepared(self, rows: np.ndarray, device: torch.device | None = None) -> Tensor:
        """Rows float32 [b, D], centred and scaled.

        Values are cut at ±2⁴⁰ against overflow. The queries lie within, and projecting a reference on a box that holds
        the query takes it no farther away: a bound from below stays one.
        """
        where = self.queries.device if device is None else device
        scaled: Tensor = torch.from_numpy(rows - self.centre).to(where).mul_(self.scale).clamp_(-(2.0**40), 2.0**40)
        return scaled

    def scores(self, rows: slice, columns: Tensor, norms: Tensor) -> Tensor:
        """Lower bounds of squared distances without the part of the query. float32 [t, b]."""
        with torch.autocast(columns.device.type, enabled=False):
            dots = self.queries[rows] @ columns
        scores: Tensor = torch.add(norms, dots, alpha=-2, out=dots)
        return scores

    def limits(self, squared: Tensor, rows: slice) -> Tensor:
        """Scores (rounded up) above which a lower bound exceeds ``squared`` float64 [t], in scaled units."""
        norms = self.norms[rows].double()
        limits = squared + self.underflow - norms
        limits += 2.0**-21 * (squared + norms)
        rounded: Tensor = limits.clamp(max=torch.finfo(torch.float32).max).float()
        return rounded

    def add(self, first: int, references: np.ndarray) -> None:
        """Take in float32 rows [b, D]."""
        block = self.prepared(checked(references))
        norms = shrunk_norms(block, self.error)
        for start in range(0, len(self.queries), self.tile):
            rows = slice(start, min(start + self.tile, len(self.queries)))
            scores = self.scores(rows, block.T, norms)
            found = below(scores, self.limits(self._bounds(self.top.keys[rows, -1]), rows))
            if found is None:
                columns = torch.arange(first, first + len(block), device=block.device)
                self.top.add_all(rows, self._keys(scores, self.norms[rows, None], columns))
                continue
            places, columns = found
            queries = places + rows.start
            self.top.add_some(queries, self._keys(scores[places, columns], self.norms[queries], columns + first))

    def _keys(self, scores: Tensor, norms: Tensor, indices: Tensor) -> Tensor:
        """The bits of a non-negative float32 order like an integer."""
        bounds = (scores + norms).sub_(self.underflow).clamp_(min=0.0)
        keys: Tensor = bounds.view(torch.int32).long().mul_(self.num_references).add_(indices)
        return keys

    def _bounds(self, keys: Tensor) -> Tensor:
        """Lower bounds of squared distances (scaled) in keys: float64; infinite where there is none."""
        bits = torch.where(keys == EMPTY, 0, keys // self.num_references).to(torch.int32)
        bounds: Tensor = bits.view(torch.float32).double().masked_fill_(keys == EMPTY, torch.inf)
        return bounds

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Lower bounds of distances float64 (infinite: none) and indices int64, each [g, slots], bounds ascending."""
        bounds = self._bounds(self.top.keys).sqrt_().div_(self.scale)
        return bounds, self.top.keys % self.num_references

    def state(self) -> State:
        """The keys."""
        return {"keys": self.top.keys.cpu().numpy()}

    def merge(self, state: State) -> None:
        """Keep the least of both."""
        self.top.add_all(slice(None), torch.from_numpy(state["keys"]).to(self.top.keys.device))


class QuantisedScan:
    """The ``slots`` nearest of N references after rounding to 8 bits, and what rounding can have done to them.

    The bounds. Map every value x of dimension j to (x − low_j) · t, where the box [0, 255]^D holds all queries. To
    project a reference on a box that holds the query brings it no farther away, and rounding the two projections moves
    them by e_q and e_r, which are measured: t·‖q − r‖ ≥ ‖q̂ − r̂‖ − e_q − e_r, where ‖q̂ − r̂‖² is an exact integer. In
    the other direction t·‖q − r‖ ≤ ‖q̂ − r̂‖ + e_q + m_r, where m_r is how far projecting and rounding moved r.

    Args:
        queries: float32 [g, D].
        box: float32 [2, D], low and high, that holds the queries (and better most references).
    """

    def __init__(
        self, queries: np.ndarray, box: np.ndarray, num: int, slots: int, count: int, tile: int, device: torch.device
    ):
        self.low, self.device = box[0], device
        self.factor = float(np.float32(255.0 / widest(box)))
        rounded, errors = self.rounded(queries)
        self.scan = IntegerScan(rounded, slots, count, num=num, tile=tile)
        self.errors, self.greatest = errors[0], torch.zeros(2, dtype=torch.float64, device=device)

    def rounded(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """int8 [n, D], and at most how far rounding, and projecting and rounding, moved each: float64 [2, n]."""
        result = torch.empty(rows.shape, dtype=torch.int8, device=self.device)
        errors = torch.empty((2, len(rows)), dtype=torch.float64, device=self.device)
        values = rows.shape[1]
        step = max(1, (1 << 18) // values)  # a piece stays in the processor's cache through all passes
        for start in range(0, len(rows), step):
            piece = slice(start, start + step)
            scaled = torch.from_numpy(rows[piece] - self.low).to(self.device)
            projected = scaled.mul_(self.factor).clamp(0.0, 255.0)
            levels = projected.round()
            for error, moved in zip(errors, (projected, scaled), strict=True):
                error[piece] = moved.sub_(levels).square_().sum(1)
            result[piece] = levels.sub_(128.0)
        # Sums in float32 are off by at most D · 2⁻²³; scaled values of up to 255 by less than 1e-4 each.
        return result, errors.sqrt_().mul_(1 + values * 2.0**-23).add_(1e-4 * values**0.5)

    def add(self, first: int, references: np.ndarray) -> None:
        """Take in float32 rows [b, D]."""
        rounded, errors = self.rounded(checked(references))
        greatest = errors.amax(1)
        # What is kept is at most so much farther than it seems, what is dropped at most so much nearer.
        self.scan.add_signed(first, rounded, 2 * self.errors + self.greatest[1] + greatest[0])
        self.greatest = torch.maximum(self.greatest, greatest)

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Lower bounds of distances float64 (infinite: none) and indices int64, each [g, slots], bounds ascending."""
        squared, indices, _, there = self.scan.unpacked()
        bounds = squared.double().sqrt_().sub_(self.errors[:, None] + self.greatest[0]).clamp_(min=0.0)
        return bounds.div_(self.factor).mul_(1 - 1e-9).masked_fill_(~there, torch.inf), indices

    def state(self) -> State:
        """The keys and the greatest errors of references."""
        return {**self.scan.state(), "greatest": self.greatest.cpu().numpy()}

    def merge(self, state: State) -> None:
        """Keep the least keys and the greatest errors of both."""
        self.scan.merge({"keys": state["keys"]})
        self.greatest = torch.maximum(self.greatest, torch.from_numpy(state["greatest"]).to(self.device))


class RangeScan:
    """The ``num`` nearest of all references whose lower bound does not exceed ``limits`` (squared, [g]): exact.

    At least ``num`` references per query must be as near as the limit. However many there are, they are computed
    directly, a block at a time, so this needs no guard; it is slow where very many references are equally far.
    """

    def __init__(self, queries: np.ndarray, limits: np.ndarray, num: int, count: int, tile: int, device: torch.device):
        self.queries, self.num = queries, num
        # A tile in which everything is near makes lists of all its pairs: keep it small.
        self.fast = FloatScan(queries, 1, count, tile=min(tile, 256), device=device)
        self.limits = torch.from_numpy(limits * (1 + 1e-9)).to(device).mul_(self.fast.scale).mul_(self.fast.scale)
        self.squared = np.full((len(queries), num), np.inf)
        self.indices = np.full((len(queries), num), count, dtype=np.int64)

    def add(self, first: int, references: np.ndarray) -> None:
        """Take in float32 rows [b, D]."""
        columns = self.fast.prepared(references)
        norms = shrunk_norms(columns, self.fast.error)
        for start in range(0, len(self.queries), self.fast.tile):
            rows = slice(start, min(start + self.fast.tile, len(self.queries)))
            near = self.fast.scores(rows, columns.T, norms) <= self.fast.limits(self.limits[rows], rows)[:, None]
            places, indices = (part.cpu().numpy() for part in near.nonzero(as_tuple=True))
            places += start
            self._keep(places, squared_distances(self.queries, references, places, indices), indices + first)

    def _keep(self, rows: np.ndarray, squared: np.ndarray, indices: np.ndarray) -> None:
        touched = np.unique(rows)
        kept = (np.repeat(touched, self.num), self.squared[touched].reshape(-1), self.indices[touched].reshape(-1))
        _, nearest, which = least(kept, (rows, squared, indices), self.num)
        self.squared[touched], self.indices[touched] = nearest.reshape(-1, self.num), which.reshape(-1, self.num)

    def state(self) -> State:
        """What was found."""
        return {"squared": self.squared, "indices": self.indices}

    def merge(self, state: State) -> None:
        """Keep the nearest of both."""
        rows = np.repeat(np.arange(len(self.queries)), self.num)
        self._keep(rows, state["squared"].reshape(-1), state["indices"].reshape(-1))


def checked(rows: np.ndarray) -> np.ndarray:
    """``rows`` if they are float32 and finite.

    Raises:
        InputError: they are not.
    """
    if rows.dtype != np.float32:
        raise InputError(f"features must be float32, not {rows.dtype}")
    # One sum tells in one pass without a mask: it is finite unless values are not, or are too large to tell.
    if not np.isfinite(rows.sum(dtype=np.float32)) and not np.isfinite(rows).all():
        raise InputError("features contain values that are not finite: mend or leave out those rows")
    return rows


def bounding_box(*parts: np.ndarray) -> np.ndarray:
    """The least and the greatest value of each dimension: [2, D] of rows [n, D]."""
    return np.stack([np.min([part.min(0) for part in parts], 0), np.max([part.max(0) for part in parts], 0)])


def widest(box: np.ndarray) -> float:
    """The longest side of a box [2, D]."""
    return float((box[1].astype(np.float64) - box[0]).max())


def shrunk_norms(rows: Tensor, error: float) -> Tensor:
    """(1 − error) ‖row‖² of float32 [n, D], summed in float64 (a piece at a time), float32 [n]."""
    norms = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), 64):
        norms[start : start + 64] = rows[start : start + 64].double().square_().sum(1)
    return norms.mul_(1 - error).float()
