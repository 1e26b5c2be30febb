"""Batch scripts for SLURM clusters, shipped as package data."""
