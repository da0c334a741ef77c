"""A round as one stream of batches, for training loops that own the order of batches and epochs."""

import logging
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

if TYPE_CHECKING:
    from unrote.method.ensemble import ShardEnsemble

logger = logging.getLogger("unrote")


class Shard(Dataset[Any]):
    """A proxy's part of the data set, as a map-style data set that adds each sample's ``index``.

    A dict gets a key ``"index"``, a tuple or list one more element; anything else becomes ``(item, index)``.

    Attributes:
        proxy: k, which proxy is live.
        indices: int64 [|D_k|], sorted positions in the data set.
    """

    def __init__(self, dataset: Any, proxy: int, indices: Tensor) -> None:
        self.dataset = dataset
        self.proxy = proxy
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Any:
        index = int(self.indices[position])
        item = self.dataset[index]
        if isinstance(item, dict):
            return {**item, "index": index}
        return (*item, index) if isinstance(item, list | tuple) else (item, index)


class _Numbered(Shard):
    """A shard whose items are (index, item), whatever the item is."""

    def __getitem__(self, position: int) -> Any:
        index = int(self.indices[position])
        return index, self.dataset[index]


class _Batch(NamedTuple):
    """A batch beside the positions of its samples: a type that loaders carry over to devices and pinned memory."""

    samples: Tensor
    batch: Any


class _Collate:
    """From items of :class:`_Numbered` to a :class:`_Batch`, by the loader's own collate function."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, items: list[Any]) -> _Batch:
        return _Batch(torch.tensor([index for index, _ in items]), self._collate([item for _, item in items]))


class RoundLoader:
    """Stands where a loop has its data loader: one pass over it is one round of the ensemble.

    Each proxy is live while its batches are handed out; when the pass ends, the model is the aggregate. Proxies change
    places when the loop asks for the first batch of the next one, so it must have stepped on the last one by then: a
    loop that fetches batches ahead is refused. Batches are what the loop's own loader makes of the data set. Gradients
    that the loop has not stepped by when a proxy's turn ends are dropped. Where processes share the batches, each must
    have its share of them: loaders are prepared by accelerate, or have a ``DistributedSampler``, whose epochs are set.

    Args:
        ensemble: whose rounds these are.
        make: from a shard to a ``DataLoader`` of it, prepared by accelerate or not; called once for each proxy.
        epochs: passes over each shard before the next proxy's turn; with redistribution that is half a round.

    Attributes:
        index: int64 [B], positions in the data set of the samples of the batch that was handed out last.

    Raises:
        ValueError: if ``make`` gives no ``DataLoader`` or one of persistent workers; while iterating, if all of several
            processes would be given the same batches, or the gate has not seen every batch of a proxy by the end of
            its turn.
    """

    def __init__(self, ensemble: "ShardEnsemble", make: Callable[[Dataset[Any]], Any], epochs: int = 1) -> None:
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {epochs}")
        self.ensemble = ensemble
        self.epochs = epochs
        self.index = torch.empty(0, dtype=torch.int64)
        # Made once: redistribution changes which samples a shard has, never how many, and accelerate keeps every loader
        # that it has ever prepared.
        self._shards = [_Numbered(ensemble.dataset, k, indices) for k, indices in enumerate(ensemble.shards)]
        self._loaders = [_numbering(make(shard)) for shard in self._shards]
        # Not held, so that a loop that is left lets go of its pass and so ends it.
        self._pass: weakref.ref[Generator[Any, None, None]] | None = None
        self._left = 0

    def __len__(self) -> int:
        """Batches in the current round."""
        return sum(len(loader) for loader in self._loaders) * self.epochs * self.ensemble.num_phases

    def __iter__(self) -> Iterator[Any]:
        self.finish()
        self._left = len(self)
        batches = self._round()
        self._pass = weakref.ref(batches)
        return batches

    def _round(self) -> Generator[Any, None, None]:
        samplers = [_shared_sampler(loader) for loader in self._loaders]
        for live in self.ensemble.round():
            self._shards[live.proxy].indices = live.indices
            seen, handed_out = self._seen(), 0
            for epoch in range(self.epochs):
                sampler = samplers[live.proxy]
                if sampler is not None:
                    sampler.set_epoch((2 * self.ensemble.round_index + self.ensemble.phase) * self.epochs + epoch)
                for index, batch in self._loaders[live.proxy]:
                    self.index = index
                    handed_out, self._left = handed_out + 1, self._left - 1
                    try:
                        yield batch
                    except GeneratorExit:
                        # A loop that counts steps may well stop at the last batch of a round: then the round is whole.
                        if self._left:
                            self._warn_of_loss()
                            raise
            if self.ensemble.gate is not None:
                _check_used(live.proxy, self._seen() - seen, handed_out)

    def _seen(self) -> int:
        return 0 if self.ensemble.gate is None else self.ensemble.gate.batches

    def finish(self) -> None:
        """End the pass that is going on, for loops that hold on to it when they stop; leaving a ``for`` does the same.

        After the last batch of a round the model becomes the aggregate; before it, the model is again as it was when
        the round began, and a warning says so.
        """
        batches = None if self._pass is None else self._pass()
        if batches is not None:
            batches.close()

    def _warn_of_loss(self) -> None:
        if self.ensemble.num_shards > 1:
            logger.warning(
                "round %d was left %d batches before its end: the model is again as it was when the round began. "
                "Stop after a whole number of rounds, so that nothing is thrown away",
                self.ensemble.round_index + 1,
                self._left,
            )


def _numbering(loader: Any) -> Any:
    inner = _inner(loader)
    if not isinstance(inner, DataLoader) or isinstance(inner.collate_fn, _Collate):
        raise ValueError(
            f"the function must make a new DataLoader of the shard it is given, not a {type(loader).__name__}"
        )
    if inner.persistent_workers:
        raise ValueError(
            "persistent_workers=True: workers would keep the shard as it was when they began, while redistribution "
            "moves samples to others; leave it out"
        )
    inner.collate_fn = _Collate(inner.collate_fn)
    return loader


def _inner(loader: Any) -> Any:
    """What accelerate's prepared loaders fetch through; any other loader itself."""
    return getattr(loader, "base_dataloader", loader)


def _shared_sampler(loader: Any) -> DistributedSampler[Any] | None:
    """What gives this process its share of the batches, unless accelerate does or there are no other processes.

    Lightning and others put it into the loaders that they see, and they see none of those of the shards.
    """
    inner = _inner(loader)
    if isinstance(inner.sampler, DistributedSampler):
        return inner.sampler
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
    if alone or inner is not loader:
        return None
    raise ValueError(
        f"each of the {dist.get_world_size()} processes would be given all batches: make the loader with "
        "sampler=torch.utils.data.distributed.DistributedSampler(part), or prepare it by accelerate"
    )


def _check_used(proxy: int, used: int, handed_out: int) -> None:
    if used < handed_out:
        raise ValueError(
            f"{used} of {handed_out} batches of proxy {proxy} had gone through the gate when the next one was asked "
            "for. Pass every batch to the gate. If you do, this loop fetches batches ahead, and proxies would change "
            "places in the middle of a step: put the ensemble's loader outermost, prepare the loaders that it is made "
            "of instead, and let gradients accumulate over a number of batches that divides those of a shard"
        )
