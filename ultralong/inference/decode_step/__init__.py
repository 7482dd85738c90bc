"""One decoding step of one or a few sequences as fast as memory can be read: fused kernels, captured in a CUDA graph.

A step of transformers' code starts some 1,500 kernels, and torch's flash kernel reads a long cache with as few blocks
as there are kv heads. `step` computes the same in 10 kernels a layer for the architectures that it knows, `kernels` has
those that are not matrix products (Triton; attention split over the whole GPU, as in flash-decoding), `plain` the same
operations in torch, for tests.
"""
