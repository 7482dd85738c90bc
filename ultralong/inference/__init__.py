"""Inference: prefill and decoding at length, on one GPU or several, with one KV cache and one decoding loop.

Two interfaces. An `Engine` takes token ids and answers in text (`LocalEngine`, `ShardedEngine`, `VllmEngine`); the
first two also stream. Below it a `Runner` is a model with its KV cache (`LocalRunner`, `ShardedRunner`,
`BatchedRunner`): `prefill` reads prompts and gives logits, `decode` reads one more token of each, `release` gives the
memory back. `generate` and `stream` run the decoding loop over any runner. `with_model` opens a checkpoint on any
number of GPUs and lets a function ask it.
"""
