"""Denoisers and their per-sample loss."""
