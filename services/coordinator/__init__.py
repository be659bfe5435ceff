"""The coordinator: decode loop, sessions, tokenization, servicer and server. No torch."""
