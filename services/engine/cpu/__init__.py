"""What computes short steps on a CPU: compiled kernels in place of many small operations of torch."""
