"""Fewer numbers per row, by a map that takes no two rows farther apart: a tenth of the products of a search."""

import math

import numpy as np
import torch
from torch import Tensor

SHARE, FEWEST = 10, 64
"""D / SHARE directions are kept (but not fewer), so that the products of a search are as many times fewer."""
MOST, MOST_NUMBERS = 512, 1 << 23
"""Directions, and numbers that all of them have together (32 MiB)."""
FEWEST_VALUES = 256
NORMS = 6
"""So many fewer, as a product has columns for norms besides, and is fastest with a multiple of 32."""
PASSES = 2
CHUNK = 128


class Reduction:
    """The coordinates of rows z in d directions of R^D: ‖y(q) − y(r)‖ ≤ ‖q − r‖ but for errors that are known.

    The directions are those in which ``sample`` varies most, in order (found by subspace iteration: Halko, Martinsson
    and Tropp, SIAM Review 53, 2011, algorithm 4.4, and turned by Rayleigh and Ritz), so that of images and features
    most of a distance is left, and much by the first few. Whatever they are, the bound holds. Let P [D, d] be the
    matrix as it is stored, δ = ‖PᵀP − I‖_F, and P̃ = P (PᵀP)^(−½) the next one with
    orthonormal columns: P̃ᵀ takes no two rows farther apart, and ‖P − P̃‖ ≤ δ. What is computed, ŷ, is P̃ᵀz but for ε‖z‖,
    ε = γ√d (1 + δ) + δ + 4u: the sums are made of chunks in float32, so each of the d is off by at most γ|P_j|·|z|,
    γ = mu/(1 − mu), m the length of a chunk and their number together, u = 2⁻²³; and centring rounded z. As
    ‖q − r‖ ≤ ‖z_q‖ + ‖z_r‖, ‖ŷ_q − ŷ_r‖² ≤ ‖q − r‖² + (4ε + 2ε²)(‖z_q‖² + ‖z_r‖²). All of it holds of the first k ≤ d
    directions with k in place of d: their part of PᵀP − I has no greater norm.

    Args:
        sample: float32 [m, D], finite.
        device: where rows are reduced.

    Attributes:
        values: d.
    """

    def __init__(self, sample: np.ndarray, device: torch.device):
        rows = torch.from_numpy(sample - sample.mean(0)).to(device)
        rows /= rows.abs().amax().clamp(min=1e-30)
        count = rows.shape[1]
        self.values = directions_of(count)
        basis = torch.randn(count, self.values, generator=torch.Generator().manual_seed(0)).to(device)
        for _ in range(PASSES):
            basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
        held = rows @ basis
        variances = (held.T @ held).double().nan_to_num(0.0, 0.0, 0.0)
        turn = torch.linalg.eigh(variances).eigenvectors.flip(1).float()
        self.basis = (basis @ turn).contiguous()
        gram = self.basis.double().T @ self.basis.double()
        gram.diagonal().sub_(1.0)
        self.skew, length = float(gram.norm()), (CHUNK + math.ceil(count / CHUNK)) * 2.0**-23
        self.norm_error = length / (1 - length)
        error = self.error(self.values)
        self.slack = (2 * error + error**2) * (1 + count * 2.0**-22)
        self.usable = self.skew < 1e-3 and error < 5e-3  # false if it is not a number, too

    def error(self, directions: int) -> float:
        """ε of the first ``directions``."""
        # A hundredth for what underflows, which ``HalfBounds.underflow`` covers where it is more.
        return 1.01 * (self.norm_error * math.sqrt(directions) * (1 + self.skew) + self.skew + 4 * 2.0**-23)

    @staticmethod
    def pays(queries: int, references: int, values: int) -> bool:
        """Whether finding and applying it is little beside the products that it spares."""
        directions = directions_of(values)
        return values >= FEWEST_VALUES and queries >= 2 * directions and queries * references >= directions << 17

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """ŷ float32 [n, d] of centred float32 rows z [n, D], and what each row takes from a bound of ½‖q − r‖²: [n]."""
        reduced, norms = self.coordinates(rows)
        return reduced, norms.mul_(self.slack)

    def coordinates(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """ŷ float32 [n, d], and ‖z‖² float64 [n] but for a share ``norm_error``."""
        reduced = torch.zeros((len(rows), self.values), device=rows.device)
        for start in range(0, rows.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            reduced.addmm_(rows[:, part], self.basis[part])
        whole = rows.shape[1] // CHUNK * CHUNK
        chunks, last = rows[:, :whole].view(len(rows), whole // CHUNK, CHUNK), rows[:, whole:]
        norms = torch.linalg.vecdot(chunks, chunks).double().sum(1)
        return reduced, norms.add_(torch.linalg.vecdot(last, last))


def directions_of(values: int) -> int:
    """d for rows of so many values."""
    share = max(FEWEST, values // SHARE)
    return min(values, max(32, min(MOST, MOST_NUMBERS // values, share) // 32 * 32) - NORMS)
