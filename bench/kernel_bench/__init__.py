"""What `python -m bench.kernels` is made of: but for `timing.CudaClock`, it runs and is tested without a GPU too."""
