"""Encoders: one file each, one surface (`backbone.Backbone`)."""
