"""Signs of memorization in a model itself, without searching the training set."""
