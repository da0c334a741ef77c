"""Exact nearest neighbours among images: a blocked matrix product with a running top-n.

8-bit pixels are integers, and so ‖x‖² + ‖y‖² − 2x·y has no cancellation error: a copy is at distance exactly 0, and no
block size, thread count, process count or order of summation can change a result. Ties go to the lower index. See
:mod:`unrote.neighbours.products` for why the products are exact.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from unrote.neighbours.features import nearest_features
from unrote.neighbours.found import MEMORY_BYTES, Neighbours
from unrote.neighbours.orbit import IDENTITY, Transform
from unrote.neighbours.products import float32_products, int8_is_exact
from unrote.neighbours.reduction import Reduction
from unrote.neighbours.scans import IntegerScan
from unrote.neighbours.streaming import Blocks, Rows, Saved, Stream, release
from unrote.ranks import Ranks

Images = Rows  # uint8 [N, H, W, C]


class Flat:
    """Images uint8 [N, ...] read as features: float32 [N, D]."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.shape = (len(rows), int(np.prod(rows.shape[1:])))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | NDArray[np.int64], /) -> np.ndarray:
        return np.asarray(self.rows[rows]).reshape(-1, self.shape[1]).astype(np.float32)


@torch.no_grad()
def nearest_images(
    queries: Images,
    references: Images,
    num: int,
    *,
    transforms: Sequence[Transform] = (IDENTITY,),
    margin: int = 0,
    memory_bytes: int = MEMORY_BYTES,
    device: str | torch.device = "cpu",
    distributed: bool = False,
    resume: Path | None = None,
    progress: str | None = None,
) -> Neighbours:
    """The ``num`` nearest references of every query, exactly: the least over transforms g of ‖query − g(reference)‖.

    Args:
        queries: uint8 [G, H, W, C].
        references: uint8 [N, H, W, C]; read in order, once per group of queries that fits the memory.
        num: how many neighbours; at most N are returned.
        transforms: the orbit of each reference; of equally near transforms the first counts.
        margin: leave so many pixels at each border of the query out of the comparison: what a shift brings in there is
            unknown. Less than half a side.
        memory_bytes: bound on the working memory (on top of the result); decides the block sizes, never the result.
        device: where the products are computed.
        distributed: every process of the initialized ``torch.distributed`` group calls this with the same arguments and
            reads its share of the references; all get the same result.
        resume: folder that keeps the progress of a long search under a hash of its content, so that the same call
            goes on where a killed one stopped.
        progress: label of a progress bar on stderr; None for no bar.

    Returns:
        Neighbours with arrays [G, min(num, N)].

    Raises:
        InputError: more references, values and transforms than 64-bit numbers can order.
    """
    assert queries.shape[1:] == references.shape[1:] and len(references) > 0 and num > 0
    num, count = min(num, len(references)), len(references)
    values = int(np.prod(references.shape[1:]))
    kind, plain = torch.device(device).type, tuple(transforms) == (IDENTITY,) and margin == 0
    # A GPU multiplies whole images sooner than the processor measures candidates.
    if plain and kind == "cpu" and not int8_is_exact(kind) and Reduction.pays(len(queries), count, values):
        # Pixels are float32 numbers, too, and float64 holds the squared distances of whole numbers as they are.
        found = nearest_features(
            Flat(queries),
            Flat(references),
            num,
            memory_bytes=memory_bytes,
            device=device,
            distributed=distributed,
            resume=resume,
            progress=progress,
        )
        return Neighbours(found.squared.astype(np.int64), found.indices, found.transforms)
    bases = len({view.unmoved for view in transforms})
    sizes = Blocks.within(memory_bytes, values, num, 2, 6 + bases)
    ranks = Ranks.here(distributed=distributed)
    saved = Saved.keyed(resume, ranks, queries, references, "images/3", num, tuple(transforms), margin, sizes.group)
    groups = range(0, len(queries), sizes.group)
    squared = np.zeros((len(queries), num), dtype=np.int64)
    indices, chosen = np.zeros_like(squared), np.zeros(squared.shape, dtype=np.int16)
    # TF32 is fast on a GPU, and exact here.
    with float32_products("high"), ranks.bar(progress, "img", len(groups), count) as bar:
        stream = Stream(references, sizes.block, ranks, saved, bar)
        for start in groups:
            group = slice(start, start + sizes.group)
            scan = IntegerScan(
                queries[group],
                num,
                count,
                views=transforms,
                margin=margin,
                tile=sizes.tile,
                device=torch.device(device),
            )
            release(queries)
            stream.run(f"images-{start}", scan)
            squared[group], indices[group], chosen[group] = (part.cpu().numpy() for part in scan.unpacked()[:3])
    return Neighbours(squared, indices, chosen)
