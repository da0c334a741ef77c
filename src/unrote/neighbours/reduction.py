"""Fewer numbers per row, by a map that takes no two rows farther apart: an eighth of the products of a search."""

import math

import numpy as np
import torch
from torch import Tensor

SHARE = 8
"""D / SHARE directions are kept, so that the products of a search are as many times fewer."""
MOST, MOST_NUMBERS = 512, 1 << 23
"""Directions, and numbers that all of them have together (32 MiB)."""
FEWEST_VALUES = 256
PASSES = 2
CHUNK = 128


class Reduction:
    """The coordinates of rows z in d directions of R^D: ‖y(q) − y(r)‖ ≤ ‖q − r‖ but for errors that are known.

    The directions are those in which ``sample`` varies most (found by subspace iteration: Halko, Martinsson and Tropp,
    SIAM Review 53, 2011, algorithm 4.4), so that of images and features most of a distance is left. Whatever they are, the bound
    holds: with P [D, d] as it is stored, δ = ‖PᵀP − I‖_F and the next matrix with orthonormal columns P̃ = P (PᵀP)^(−½),
    ‖P − P̃‖ ≤ δ, and P̃ᵀ takes no two rows farther apart. What is computed, ŷ, is P̃ᵀz but for ε‖z‖,
    ε = γ√d (1 + δ) + δ + 4u: chunks of the sums are summed in float32, so each of the d sums is off by at most γ|P_j|·|z|,
    γ = mu/(1 − mu), m the length of a chunk and their number together, u = 2⁻²³; and centring rounded z. As
    ‖q − r‖ ≤ ‖z_q‖ + ‖z_r‖, then ‖ŷ_q − ŷ_r‖² ≤ ‖q − r‖² + (4ε + 2ε²)(‖z_q‖² + ‖z_r‖²).

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
        self.values = min(count, max(32, min(MOST, MOST_NUMBERS // count, count // SHARE) // 32 * 32))
        basis = torch.randn(count, self.values, generator=torch.Generator().manual_seed(0)).to(device)
        for _ in range(PASSES):
            basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
        self.basis = basis.contiguous()
        gram = self.basis.double().T @ self.basis.double()
        gram.diagonal().sub_(1.0)
        skew, length = float(gram.norm()), (CHUNK + math.ceil(count / CHUNK)) * 2.0**-23
        # A hundredth for second orders and for what underflows, which ``HalfBounds.underflow`` covers where that is more.
        error = 1.01 * (length / (1 - length) * math.sqrt(self.values) * (1 + skew) + skew + 4 * 2.0**-23)
        self.slack = (2 * error + error**2) * (1 + count * 2.0**-22)
        self.usable = skew < 1e-3  # false if it is not a number, too

    @staticmethod
    def worthwhile(values: int) -> bool:
        """Whether rows are long enough for it."""
        return values >= FEWEST_VALUES

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """ŷ float32 [n, d] of centred float32 rows z [n, D], and what each row takes from a bound of ½‖q − r‖²: [n]."""
        reduced = torch.zeros((len(rows), self.values), device=rows.device)
        for start in range(0, rows.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            reduced.addmm_(rows[:, part], self.basis[part])
        return reduced, torch.linalg.vecdot(rows, rows).double().mul_(self.slack)
