"""Documents become tokens, tokens become packed rows.

`documents` reads, `sampling` applies the length rule and the budgets, `tokens` tokenises into memory-mapped shards,
`packing` cuts them into rows of exactly the target length, `chat` does the same for conversations, `recipe` describes
all of it in one YAML file, `build` runs such a file from end to end and `fetch` brings public sources to this machine.
"""
