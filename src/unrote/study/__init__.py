"""Mitigations compared under one protocol: equal samples seen, equal model, measured along training."""
