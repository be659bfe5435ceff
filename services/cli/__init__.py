"""The `outrider` command, built on the client."""
