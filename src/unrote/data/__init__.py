"""Image sources: whatever the user has becomes one kind of store."""

from unrote.data.decode import MAX_PIXELS
from unrote.data.opening import open_images
from unrote.data.store import ImageRows, ImageStore, Quarantined, in_memory_store

__all__ = ["MAX_PIXELS", "ImageRows", "ImageStore", "Quarantined", "in_memory_store", "open_images"]
