"""Corpus to encoder: backbones, objectives, the loader, the loop, checkpoints and releases."""
