"""Scans of float32 features: bounds of distances from below that are proven, so that what they drop is known."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from unrote.errors import InputError
from unrote.neighbours.direct import least, squared_distances
from unrote.neighbours.products import dense_product
from unrote.neighbours.reduction import Reduction
from unrote.neighbours.running_top import FloatTop, below
from unrote.neighbours.scans import IntegerScan, State

DITHER_BITS = 15
PIECES = 3  # bfloat16 numbers that hold a float32 number but for 2⁻²⁷ of it


class HalfBounds:
    """Matrix products that are lower bounds of ½‖q − r‖² less a threshold per query, for float32 rows q and r.

    Rows are centred and scaled by a power of two. Next to the values, each row has columns for the norms: a query
    (−q, 1, a) and a reference (r, b, 1) have the product b + a − q·r, and with b = (1 − c)½‖r‖² and
    a = (1 − c)½‖q‖² − (1 + c)t that is ½‖q − r‖² − t less a margin. The margin holds the errors: let u = 2⁻²³ (twice
    the unit roundoff of float32, so that truncating adders are covered). A float32 sum of K products in any order is
    off by at most γ(Σ|q_j r_j| + |b| + |a|) ≤ γ(‖q‖² + ‖r‖² + t), γ = Ku/(1 − Ku); rounding the centred rows, the norms
    and what is kept adds less than 8u(‖q‖² + ‖r‖² + t); so c = 2γ + 16u. Underflow is covered by K · 2⁻⁸⁰.

    With ``coarse``, rows are rounded to bfloat16 too, at twice the speed. Then the above holds of the rounded rows,
    and how far rounding moved each row is measured. Products of bfloat16 are summed in float32 and rounded to bfloat16
    once, which moves them by less than 2⁻⁸ of themselves: little where the distance is near the threshold.

    With a ``reduction``, rows are reduced first, all of the above holds of what they are reduced to, and each row's
    slack is taken off its half norm.

    Args:
        queries: float32 [g, D].
        box: float32 [2, D], low and high, that holds the queries. With ``coarse``, references are projected on a cube
            around it, which takes them no farther from any query; outside they would be rounded too coarsely.
        device: where the products are computed.
        reduction: of scaled rows; None leaves them as they are.
    """

    def __init__(
        self,
        queries: np.ndarray,
        box: np.ndarray,
        device: torch.device,
        *,
        coarse: bool,
        reduction: Reduction | None = None,
    ):
        self.centre, self.scale = framed(queries, box)
        self.device, self.coarse, self.reduction = device, coarse, reduction
        self.values = queries.shape[1] if reduction is None else reduction.values
        # Cut against overflow; the queries lie within.
        self.limit = 1.0 if coarse else 2.0**40
        self.width = -(-(self.values + 2 * PIECES) // 32) * 32
        rounding = self.width * 2.0**-23
        if rounding > 0.25:
            raise InputError(f"features have {self.values} values; the search is proven for up to {2**21 - 64}")
        self.margin = 2 * rounding / (1 - rounding) + 16 * 2.0**-23
        self.underflow = self.width * 2.0**-80
        dtype = torch.bfloat16 if coarse else torch.float32
        # Kept, as fresh memory costs as much as what is done in it.
        self._products, self._block = (
            torch.zeros((0, *shape), dtype=dtype, device=device) for shape in ((), (self.width,))
        )
        self.queries = torch.zeros((len(queries), self.width), dtype=dtype, device=device)
        self.halves, self.errors = self._prepare(queries, self.queries)
        self.queries[:, : self.values].neg_()
        self.queries[:, self.values : self.values + PIECES] = 1.0

    def references(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The right side of the products [b, K], and how far rounding moved each row, float64 [b], scaled.

        The next call overwrites them.
        """
        if len(self._block) < len(rows):
            self._block = torch.zeros((len(rows), self.width), dtype=self.queries.dtype, device=self.device)
        prepared = self._block[: len(rows)]
        halves, errors = self._prepare(rows, prepared)
        self._fill(prepared[:, self.values : self.values + PIECES], halves)
        prepared[:, self.values + PIECES : self.values + 2 * PIECES] = 1.0
        return prepared, errors

    def bounds(self, rows: slice, references: Tensor, thresholds: Tensor) -> Tensor:
        """½‖q − r‖² − t or less, [g, b]; ``thresholds`` t float64 [g], scaled. The next call overwrites it."""
        queries = self.queries[rows]
        last = queries[:, self.values + PIECES : self.values + 2 * PIECES]
        self._fill(last, self.halves[rows] - (1 + self.margin) * thresholds - self.underflow)
        size = len(queries) * len(references)
        if len(self._products) < size:
            self._products = torch.empty(size, dtype=references.dtype, device=self.device)
        return dense_product(queries, references.T, self._products[:size].view(len(queries), -1))

    def squared(self, bounds: Tensor, thresholds: Tensor) -> Tensor:
        """Lower bounds of squared distances, float64, of what :meth:`bounds` gave."""
        bounds = bounds.double()
        if self.coarse:
            bounds = bounds - bounds.abs() * 2.0**-8
        return (bounds + thresholds).mul_(2.0).clamp_(min=0.0)

    def _prepare(self, rows: np.ndarray, prepared: Tensor) -> tuple[Tensor, Tensor]:
        """Write the values of ``rows`` into ``prepared``; (1 − c)½‖row‖² and how far rounding moved each."""
        halves = torch.empty(len(rows), dtype=torch.float64, device=self.device)
        errors = torch.zeros_like(halves)
        slack = torch.zeros_like(halves)
        # A piece stays in the processor's cache through all passes; a product wants more of it.
        step = max(1, (1 << (17 if self.reduction is None else 20)) // rows.shape[1])
        for start in range(0, len(rows), step):
            piece = slice(start, start + step)
            scaled = torch.from_numpy(rows[piece] - self.centre).to(self.device)
            scaled.mul_(self.scale).clamp_(-self.limit, self.limit)
            if self.reduction is not None:
                scaled, slack[piece] = self.reduction(scaled)
            prepared[piece, : self.values] = scaled
            if self.coarse:
                rounded = prepared[piece, : self.values].float()
                errors[piece] = scaled.sub_(rounded).square_().sum(1)
                scaled = rounded
            halves[piece] = scaled.double().square_().sum(1)
        if self.coarse:
            # The sum in float32 is off by at most D · 2⁻²³ of itself; centring rounded the values, too.
            errors.sqrt_().mul_(1 + self.values * 2.0**-23).add_(2.0**-22 * halves.sqrt())
        # The slack need not be small beside the halves, so it has a share of their margin.
        return halves.mul_((1 - self.margin) / 2).sub_(slack, alpha=1 + 2 * self.margin), errors

    def _fill(self, columns: Tensor, numbers: Tensor) -> None:
        """Write ``numbers`` float64 [n] into columns [n, PIECES] whose sum they are."""
        rest = numbers
        for column in columns.unbind(1):
            column.copy_(rest)
            rest = rest - column.double()


class FloatScan:
    """The ``slots`` references with the least lower bounds of their distance to float32 queries.

    Args:
        queries, box, device, coarse, reduction: see :class:`HalfBounds`.
        slots: how many to keep per query.
        num_references: N.
        tile: how many queries at once.
    """

    def __init__(
        self,
        queries: np.ndarray,
        box: np.ndarray,
        slots: int,
        num_references: int,
        *,
        tile: int,
        device: torch.device,
        coarse: bool = False,
        reduction: Reduction | None = None,
    ):
        self.half = HalfBounds(queries, box, device, coarse=coarse, reduction=reduction)
        self.tile = tile
        self.top = FloatTop(len(queries), slots, num_references, device)
        self.greatest = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, first: int, references: np.ndarray) -> None:
        """Take in float32 rows [b, D]."""
        block, errors = self.half.references(checked(references))
        self.greatest = torch.maximum(self.greatest, errors.amax())
        for start in range(0, len(self.top.keys), self.tile):
            rows = slice(start, min(start + self.tile, len(self.top.keys)))
            last = self.top.squared(self.top.keys[rows, -1])
            thresholds = last.div(2.0).masked_fill_(last == torch.inf, 0.0)
            bounds = self.half.bounds(rows, block, thresholds)
            found = below(bounds, torch.where(last == torch.inf, torch.inf, 0.0).to(bounds.dtype))
            if found is None:
                columns = torch.arange(first, first + len(block), device=bounds.device)
                for part in self.top.parts(rows, bounds):
                    inside = slice(part.start - start, part.stop - start)
                    squared = self.half.squared(bounds[inside], thresholds[inside, None])
                    self.top.add_all(part, self.top.keys_of(squared, columns))
                continue
            places, columns = found
            squared = self.half.squared(bounds[places, columns], thresholds[places])
            self.top.add_some(places + start, self.top.keys_of(squared, columns + first))

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Lower bounds of distances float64 (infinite: none) and indices int64, each [g, slots], bounds ascending."""
        bounds = self.top.squared(self.top.keys).sqrt_().sub_(self.half.errors[:, None] + self.greatest).clamp_(min=0.0)
        return bounds.div_(self.half.scale).mul_(1 - 1e-9), self.top.indices()

    def state(self) -> State:
        """The keys and the greatest rounding of references."""
        return {"keys": self.top.keys.cpu().numpy(), "greatest": self.greatest.cpu().numpy()}

    def merge(self, state: State) -> None:
        """Keep the least of both, and the greatest rounding."""
        self.top.add_all(slice(None), torch.from_numpy(state["keys"]).to(self.top.keys.device))
        self.greatest = torch.maximum(self.greatest, torch.from_numpy(state["greatest"]).to(self.greatest.device))


class QuantisedScan:
    """The ``slots`` nearest of N references after rounding to 8 bits at random, and what that can have done to them.

    The bounds. Map every value x of dimension j to y = (x − low_j) · t, where the box [0, 255]^D holds all queries. To
    project a reference on a box that holds the query brings it no farther away. Then ŷ = ⌊y + u_j⌋, where one vector u,
    uniform in [0, 1)^D, serves queries and references alike. With a = y_q − y_r, ŷ_q − ŷ_r is a + ε, where a_j + ε_j is
    one of the two whole numbers next to a_j, E ε = 0, and the ε_j are independent. By Hoeffding (JASA 58, 1963, theorem
    2) |⟨a, ε⟩| ≤ c‖a‖ and ‖ε‖² ≤ D/4 + c√D =: m, but for probabilities of 2⁻⁸⁰ each, with c² = 40 ln 2: so
    ‖a‖² + 2c‖a‖ + m ≥ ‖ŷ_q − ŷ_r‖² ≥ ‖a‖² − 2c‖a‖, and ‖ŷ_q − ŷ_r‖² is an exact integer. c does not grow with D, as the
    sum of how far rounding moved both (√(D/3)) does. u is drawn from a hash of the queries, so these cannot be chosen
    against it. In fixed point with 15 bits after the point all of this holds exactly; to come there moves a value by
    less than 10⁻⁴.

    Args:
        queries: float32 [g, D].
        box: float32 [2, D], low and high, that holds the queries (and better most references).
    """

    def __init__(
        self, queries: np.ndarray, box: np.ndarray, num: int, slots: int, count: int, tile: int, device: torch.device
    ):
        values = queries.shape[1]
        # Each side in the middle of a side of the cube, so that few references lie outside.
        self.low, self.device = (box.mean(0, dtype=np.float64) - widest(box) / 2).astype(np.float32), device
        self.factor = float(np.float32(255.0 / widest(box)))
        seed = hashlib.sha256(np.ascontiguousarray(queries).data).digest()
        dither = np.random.default_rng(list(seed)).integers(0, 1 << DITHER_BITS, values, dtype=np.int32)
        self.dither = torch.from_numpy(dither).to(device).float().mul_(2.0**-DITHER_BITS)
        self.cross = math.sqrt(40 * math.log(2))
        self.swing = min(values / 4 + self.cross * math.sqrt(values), float(values))
        self.moved = torch.zeros((), dtype=torch.float64, device=device)
        rounded, outside = self.rounded(queries)
        self.fixed = 2e-4 * math.sqrt(values) + float(outside)  # float32 has put the cube a little beside the box
        self.scan = IntegerScan(rounded, slots, count, num=num, tile=tile, device=device)

    def rounded(self, rows: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Images uint8 [n, 1, 1, D], and how far projecting moved a row at most, float64."""
        result = torch.empty(rows.shape, dtype=torch.uint8)
        moved = torch.zeros((), dtype=torch.float64, device=self.device)
        values = rows.shape[1]
        step = max(1, (1 << 17) // values)  # a piece stays in the processor's cache through all passes
        for start in range(0, len(rows), step):
            piece = slice(start, start + step)
            # From 256 to 511 a float32 has 15 bits after the point: adding u is exact, and 256 is 0 in 8 bits.
            fixed = torch.from_numpy(rows[piece] - self.low).to(self.device).mul_(self.factor).add_(256.0)
            low, high = torch.aminmax(fixed)
            if not (low >= 256.0 and high <= 511.0):
                projected = fixed.clamp(256.0, 511.0)
                moved = torch.maximum(moved, torch.linalg.vecdot(fixed.sub_(projected), fixed).amax())
                fixed = projected
            result[piece] = fixed.add_(self.dither).int()
        # A sum in float32 is off by at most D · 2⁻²³ of itself.
        return result.numpy()[:, None, None], moved.sqrt_().mul_(1 + values * 2.0**-23)

    def add(self, first: int, references: np.ndarray) -> None:
        """Take in float32 rows [b, D]."""
        rounded, moved = self.rounded(references)
        if not moved.isfinite():
            checked(references)
        self.moved = torch.maximum(self.moved, moved)
        self.scan.add(first, rounded, self._allowed)

    def _allowed(self, distances: Tensor) -> Tensor:
        """Squared distances after rounding that something as near as what has these (not squared) can have."""
        nearest = distances.square().add_(self.cross**2).sqrt_().add_(self.cross + 2 * self.fixed + self.moved)
        return nearest.add(2 * self.cross).mul_(nearest).add_(self.swing)

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Lower bounds of distances float64 (infinite: none) and indices int64, each [g, slots], bounds ascending."""
        squared, indices, _, there = self.scan.unpacked()
        bounds = squared.double().sub_(self.swing).clamp_(min=0.0).add_(self.cross**2).sqrt_()
        bounds.sub_(self.cross + self.fixed).clamp_(min=0.0).div_(self.factor).mul_(1 - 1e-9)
        return bounds.masked_fill_(~there, torch.inf), indices

    def state(self) -> State:
        """The keys, and how far projecting moved a reference at most."""
        return {**self.scan.state(), "moved": self.moved.cpu().numpy()}

    def merge(self, state: State) -> None:
        """Keep the least keys and the greatest move of both."""
        self.scan.merge({"keys": state["keys"]})
        self.moved = torch.maximum(self.moved, torch.from_numpy(state["moved"]).to(self.device))


class RangeScan:
    """The ``num`` nearest of all references whose lower bound does not exceed ``limits`` (squared, [g]): exact.

    At least ``num`` references per query must be as near as the limit. However many there are, they are computed
    directly, a block at a time, so this needs no guard; it is slow where very many references are equally far.
    """

    def __init__(
        self,
        queries: np.ndarray,
        limits: np.ndarray,
        num: int,
        tile: int,
        device: torch.device,
        reduction: Reduction | None = None,
    ):
        self.queries, self.num = queries, num
        self.half = HalfBounds(queries, bounding_box(queries), device, coarse=False, reduction=reduction)
        # A tile in which everything is near makes lists of all its pairs: keep it small.
        self.tile = min(tile, 256)
        # Two factors, as the square of the scale can be beyond float64.
        scaled = torch.from_numpy(limits * (1 + 1e-9) / 2).to(device).mul_(self.half.scale).mul_(self.half.scale)
        self.thresholds = scaled.clamp_(max=2.0**100)
        self.squared = np.full((len(queries), num), np.inf)
        self.indices = np.full((len(queries), num), np.iinfo(np.int64).max, dtype=np.int64)

    def add(self, first: int, references: np.ndarray) -> None:
        """Take in float32 rows [b, D]."""
        block, _ = self.half.references(references)
        for start in range(0, len(self.queries), self.tile):
            rows = slice(start, min(start + self.tile, len(self.queries)))
            near = self.half.bounds(rows, block, self.thresholds[rows]) <= 0.0
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


def framed(queries: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean of the queries float32 [D], and a power of two that brings the box [2, D] about it into [−1, 1]."""
    centre = torch.from_numpy(queries).mean(0, dtype=torch.float64).float().numpy()
    largest = float(np.abs(box.astype(np.float64) - centre).max(initial=0.0))
    return centre, 2.0 ** -min(max(math.frexp(largest)[1], -126), 126)


def bounding_box(*parts: np.ndarray) -> np.ndarray:
    """The least and the greatest value of each dimension: [2, D] of rows [n, D]."""
    return np.stack([np.min([part.min(0) for part in parts], 0), np.max([part.max(0) for part in parts], 0)])


def widest(box: np.ndarray) -> float:
    """The longest side of a box [2, D]."""
    return float((box[1].astype(np.float64) - box[0]).max())
