"""The suite `kernels`: but for `timing.CudaClock`, it runs and is tested without a GPU too."""
