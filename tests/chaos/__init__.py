"""The chaos test: every part of a running Outrider dies, stands still or is cut off while clients stream from it."""
