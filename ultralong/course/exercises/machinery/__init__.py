"""Exercises of notebooks 05 to 08: kernels, several GPUs, memory and a run on one GPU."""
