"""The draft worker: its sequences, servicer and server."""
