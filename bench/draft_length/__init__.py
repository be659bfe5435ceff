"""The draft length: adaptive against every fixed one, and what `outrider plan` says of it."""
