"""The method, IET-AGC+: knows only torch and sample indices, no images and no files formats."""
