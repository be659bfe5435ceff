"""The engine on a CPU against the memory's limit and against transformers: `python -m bench.engine`."""
