"""Pretraining objectives: one file each, one contract (`pretrain.objective.Objective`)."""
