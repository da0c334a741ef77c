"""Exact nearest neighbours, among images and among features."""
