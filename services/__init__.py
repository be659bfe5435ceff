"""Outrider: distributed speculative decoding. The import path is the file path; see README.md for the map."""
