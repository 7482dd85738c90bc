"""Documents become tokens, tokens become packed rows.

`readers` reads documents, `sampling` applies the length rule and the budgets, `tokens` tokenises into memory-mapped
shards, `packing` cuts them into rows of exactly the target length, `chat` does the same for conversations, `fetch`
brings public sources to this machine, and `recipe` runs all of it from one YAML file. `rows.PackedRows` is what
training reads.
"""
