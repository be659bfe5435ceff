"""Drafters: the ways to propose tokens. `base` has the seam."""
