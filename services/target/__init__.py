"""The target worker: scheduler, core, servicer and server."""
