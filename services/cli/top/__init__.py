"""`outrider top`: a cluster at work."""
