"""The engine on one GPU against the memory's limit and against transformers: `python -m bench.gpu`."""
