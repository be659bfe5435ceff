"""`outrider bench`: load on a cluster, with and without speculation, and what came of it."""
