"""How data sets lie on disk: one file for each layout, and `find` that recognises them."""
