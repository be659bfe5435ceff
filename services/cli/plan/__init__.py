"""`outrider plan`: capacity questions answered by a discrete-event simulation."""
