"""A scan of float32 features by ever dearer lower bounds: what the first leave is little, and is told in float32."""

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from unrote.neighbours.feature_scans import checked, framed
from unrote.neighbours.products import dense_product
from unrote.neighbours.reduction import Reduction
from unrote.neighbours.running_top import FloatTop
from unrote.neighbours.scans import State

UNIT = 2.0**-23  # twice the unit roundoff of float32
LEADING = 94  # directions of the first bound: with two more columns a short product
TILE = 512  # queries whose rows a processor's last cache holds
DENSE = 8  # a number of a product at single positions costs as much as so many of a whole product
FAR = 2.0**40


class CascadeScan:
    """The ``slots`` references with the least distances to float32 queries, as far as float32 tells.

    Rows are centred and scaled by a power of two, to z. Nothing is done with a pair any more once a lower bound of its
    distance exceeds the limit of its query, below which ``num`` references are known to be. There are three bounds:
    by the first coordinates of a :class:`Reduction` (a short product), by all of them and by z itself (products at
    single positions). References outside a cube of 2⁴⁰ times the queries' are projected on it, which takes them no
    farther from any query; a limit beyond 2⁷⁰ counts as none.

    Proof. Let u = 2⁻²³ and n = ‖z‖², computed as n̂ with an error of νn at most. Let y be the exact coordinates in d
    orthonormal directions, ŷ those computed, ‖ŷ − y‖ ≤ ε‖z‖, and w² = n − ‖y‖² what lies outside. By Cauchy and
    Schwarz z_q·z_r ≤ y_q·y_r + w_q w_r. As |‖ŷ‖² − ‖y‖²| ≤ (2ε + ε²)n, W² = max(0, n̂ − ‖ŷ‖²) + κn̂ is at least w² with
    κ = 1.01(2ε + ε² + ν + γ_d) + 4u (and D · 2⁻¹²⁰ more, as squares underflow); and |ŷ_q·ŷ_r − y_q·y_r| ≤
    (2ε + ε²)‖z_q‖‖z_r‖. So

        ‖z_q − z_r‖² ≥ n_q + n_r − 2(ŷ_q·ŷ_r + W_q W_r) − (2ε + ε²)(n_q + n_r).

    A float32 sum of K products in any order, whether fused or not, is off by at most γ_K = Ku/(1 − Ku) of the sum of
    their magnitudes. Those of (−2ŷ_q, −2W_q, 1)·(ŷ_r, W_r, h_r) sum to 1.1n_q + 2.1n_r at most, centring moved
    ‖z_q − z_r‖² by no more than 8u(n_q + n_r), and h_r, and what the product is compared with, are rounded once. So
    with h = (1 − σ)n̂, σ = 1.01(2ε + ε² + ν + 3γ_K) + 16u, the product exceeds (1 + 4u)t − h_q only if the squared
    distance exceeds t.

    The third: e = 1.01(γ_D + ν) + 32u bounds how far d̂ = n̂_q + n̂_r − 2z_q·z_r, rounded to float32, is off as a share
    of n_q + n_r. As ‖z_r‖ ≤ ‖z_q‖ + d, that is at most 3n_q + 2d². So (d̂ − 3en_q)/(1 + 2e) ≤ d² ≤ (d̂ + 3en_q)/(1 − 2e):
    both bounds order references as d̂ does, and the n-th least d̂ gives a limit. What underflows is less than D · 2⁻⁸⁰.

    Args:
        queries: float32 [g, D].
        box: float32 [2, D], low and high, that holds the queries.
        num: neighbours asked for.
        slots: how many to keep per query, ``num`` at least.
        count: N.
        tile: how many queries at once, at most.
        reduction: of rows z.

    Attributes:
        limits: squared distances (scaled) that ``num`` references are known not to exceed, float64 [g].
    """

    def __init__(
        self, queries: np.ndarray, box: np.ndarray, num: int, slots: int, count: int, tile: int, reduction: Reduction
    ):
        self.num, self.reduction = num, reduction
        # Pairs are listed with several numbers each.
        self.tile = max(1, min(TILE, tile // 4))
        self.centre, self.scale = framed(queries, box)
        values = queries.shape[1]
        self.error = 1.01 * (_gamma(values) + reduction.norm_error) + 32 * UNIT
        self.underflow = values * 2.0**-80
        # Of few directions the first bound is of all of them.
        self.widths = sorted({min(LEADING, reduction.values), reduction.values})
        self.slacks = []
        for width in self.widths:
            error = reduction.error(width)
            common = 2 * error + error**2 + reduction.norm_error
            self.slacks.append(
                (1.01 * (common + _gamma(width)) + 4 * UNIT, 1.01 * (common + 3 * _gamma(width + 8)) + 16 * UNIT)
            )
        # Kept, as fresh memory costs as much as what is done in it.
        self._scores, self._block = torch.empty(0), torch.empty((0, values))
        self.queries, self.norms, self.sides = self._prepared(queries)
        self._block = torch.empty((0, values))
        for side in self.sides:
            side[:, :-1].mul_(-2.0)
            side[:, -1] = 1.0
        self.top = FloatTop(len(queries), slots, count, torch.device("cpu"))
        self.limits = torch.full((len(queries),), torch.inf, dtype=torch.float64)

    def expect(self, sample: np.ndarray) -> None:
        """Limits by different references float32 [m, D]: by those ``num`` of them with the least bounds."""
        if len(sample) < self.num:
            return
        block, norms, sides = self._prepared(sample)
        for start in range(0, len(self.queries), self.tile):
            rows = slice(start, start + self.tile)
            bounds = dense_product(self.sides[-1][rows], sides[-1].T)
            places = bounds.topk(self.num, dim=1, largest=False, sorted=False).indices
            flat = places.add_(torch.arange(len(bounds))[:, None] * len(block)).sort().values.view(-1)
            squared = self._squared(self.norms[rows], norms, flat, _products(self.queries[rows], block, flat))
            self.limits[rows] = self._above(squared.view(-1, self.num).amax(1), rows)

    def add(self, first: int, references: np.ndarray) -> None:
        """Take in float32 rows [b, D]."""
        block, norms, sides = self._prepared(references)
        for start in range(0, len(self.queries), self.tile):
            rows = slice(start, min(start + self.tile, len(self.queries)))
            queries, limits = rows.stop - start, self._limits(rows)
            size = len(block) * queries
            if len(self._scores) < size:
                self._scores = torch.empty(size)
            scores = dense_product(sides[0], self.sides[0][rows].T, self._scores[:size].view(len(block), queries))
            # Numpy finds them several times faster than torch.
            flat = torch.from_numpy(np.flatnonzero((scores <= self._allowed(0, rows, limits)).numpy()))
            for stage in range(1, len(sides)):
                bounds = _products(sides[stage], self.sides[stage][rows], flat)
                flat = flat[bounds <= self._allowed(stage, rows, limits)[flat % queries]]
            squared = self._squared(norms, self.norms[rows], flat, _products(block, self.queries[rows], flat))
            places = flat % queries
            near = (
                squared <= (limits * (1 + 2 * self.error) + 3 * self.error * self.norms[rows] + self.underflow)[places]
            )
            places, squared, flat = places[near], squared[near], flat[near]
            keys = self.top.keys_of(squared, flat.div_(queries, rounding_mode="floor").add_(first))
            order = torch.from_numpy(np.argsort(places.numpy().astype(np.int16), kind="stable"))
            self.top.add_some(places[order] + start, keys[order])

    def work(self, references: np.ndarray, distances: Tensor) -> float:
        """Time per pair as a share of a product's, roughly, with limits as near as ``distances`` [g]."""
        block, _, sides = self._prepared(references)
        limits, rows = distances.double().mul_(self.scale).square_(), slice(None)
        lengths = [*(side.shape[1] for side in sides), block.shape[1]]
        total = float(lengths[0])
        for stage, following in enumerate(lengths[1:]):
            near = dense_product(sides[stage], self.sides[stage].T) <= self._allowed(stage, rows, limits)
            total += DENSE * following * float(near.float().mean())
        return total / block.shape[1]

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Lower bounds of distances float64 and indices int64, each [g, slots], bounds ascending.

        Infinite where there is none, and where ``num`` others are nearer for sure.
        """
        bounds = self.top.squared(self.top.keys).sub_((3 * self.error * self.norms + self.underflow)[:, None])
        bounds.div_(1 + 2 * self.error).clamp_(min=0.0)
        bounds.masked_fill_(bounds > self._limits(slice(None))[:, None], torch.inf)
        return bounds.sqrt_().div_(self.scale).mul_(1 - 1e-9), self.top.indices()

    def state(self) -> State:
        """The keys and the limits."""
        return {"keys": self.top.keys.numpy(), "limits": self.limits.numpy()}

    def merge(self, state: State) -> None:
        """Keep the least of both."""
        self.top.add_all(slice(None), torch.from_numpy(state["keys"]))
        self.limits = torch.minimum(self.limits, torch.from_numpy(state["limits"]))

    def _prepared(self, rows: np.ndarray) -> tuple[Tensor, Tensor, list[Tensor]]:
        """z float32 [n, D] (which the next call overwrites), n̂ float64 [n], and (ŷ, W, h) of each bound."""
        if len(self._block) < len(rows):
            self._block = torch.empty(rows.shape)
        centred, norms = self._block[: len(rows)], torch.empty(len(rows), dtype=torch.float64)
        reduced = torch.empty((len(rows), self.reduction.values))
        # A piece stays in the processor's cache through all passes.
        step = max(1, (1 << 20) // rows.shape[1])
        for start in range(0, len(rows), step):
            piece = slice(start, start + step)
            part = centred[piece]
            np.subtract(rows[piece], self.centre, out=part.numpy())
            reduced[piece], norms[piece] = self.reduction.coordinates(part.mul_(self.scale))
            if not norms[piece].amax() < FAR**2:
                checked(rows[piece])
                reduced[piece], norms[piece] = self.reduction.coordinates(part.clamp_(-FAR, FAR))
        sides = []
        for width, (outside, slack) in zip(self.widths, self.slacks, strict=True):
            # A whole number of what a processor multiplies at once.
            side = torch.zeros((len(rows), -(-(width + 2) // 8) * 8))
            side[:, :width] = leading = reduced[:, :width]
            rest = norms - torch.linalg.vecdot(leading, leading)
            rest.clamp_(min=0.0).add_(norms, alpha=outside).add_(self.underflow * 2.0**-40)
            side[:, width] = rest.sqrt_().mul_(1 + UNIT)
            side[:, -1] = norms * (1 - slack)
            sides.append(side)
        return centred, norms, sides

    def _allowed(self, stage: int, rows: slice, limits: Tensor) -> Tensor:
        """What the product of a stage does not exceed where a squared distance does not exceed ``limits``: [t]."""
        most = limits * (1 + 4 * UNIT) - self.norms[rows] * (1 - self.slacks[stage][1])
        return most.add_(self.underflow).float()

    @staticmethod
    def _squared(left: Tensor, right: Tensor, flat: Tensor, products: Tensor) -> Tensor:
        """d̂ float64 [m]."""
        squared = left[flat // len(right)] + right[flat % len(right)]
        return squared.sub_(products.double(), alpha=2.0).clamp_(min=0.0)

    def _above(self, squared: Tensor, rows: slice) -> Tensor:
        """The most that the squared distance can be where d̂ is ``squared``: [t]."""
        most: Tensor = (squared + 3 * self.error * self.norms[rows] + self.underflow) / (1 - 2 * self.error)
        return most.masked_fill_(most > FAR**2 / 2**10, torch.inf)

    def _limits(self, rows: slice) -> Tensor:
        return torch.minimum(self.limits[rows], self._above(self.top.squared(self.top.keys[rows, self.num - 1]), rows))


def _gamma(count: int) -> float:
    """γ_K; infinite where nothing is proven."""
    share = count * UNIT
    return share / (1 - share) if share < 0.25 else math.inf


def _products(left: Tensor, right: Tensor, flat: Tensor) -> Tensor:
    """left[i] · right[j] of the positions i · len(right) + j in ``flat`` [m], which ascend, summed in float32."""
    if DENSE * len(flat) > len(left) * len(right):
        return dense_product(left, right.T).view(-1)[flat]
    if len(flat) == 0:
        return torch.empty(0)
    starts = torch.searchsorted(flat, torch.arange(len(left) + 1) * len(right))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        wanted = torch.sparse_csr_tensor(
            starts, flat % len(right), torch.zeros(len(flat)), (len(left), len(right)), check_invariants=False
        )
    # It reads the rows where they lie: to gather them first takes longer than to multiply them.
    products: Tensor = torch.sparse.sampled_addmm(wanted, left, right.T, beta=0.0).values()
    return products
