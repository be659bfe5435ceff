"""The typed async client library."""
