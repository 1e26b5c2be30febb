"""Encoder to segmentation, scores and tables that can be believed."""
