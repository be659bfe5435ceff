"""The engine on CUDA devices: attention that reads blocks in place, and steps replayed from CUDA graphs."""
