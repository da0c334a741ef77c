"""A look at images before training: duplicates, leaks, what is at risk."""
