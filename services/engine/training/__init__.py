"""Training drafts from a target alone: it writes what they learn from (`python -m services.engine.training`)."""
