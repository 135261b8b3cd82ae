"""Measurements: cases, the runner, longer experiments and the check on a GPU. See README.md."""
