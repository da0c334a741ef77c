"""Feature spaces: what an image becomes before images or sets of images are compared."""
