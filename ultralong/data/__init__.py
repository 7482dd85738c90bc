"""Documents become tokens, tokens become packed rows.

`readers` reads documents, `sampling` applies the length rule and the budgets, `tokens` tokenises into memory-mapped
shards, `packing` cuts them into rows of exactly the target length, `fetch` brings public sources to this machine, and
`recipe` runs all of it from one YAML file. `rows.PackedRows` is what training reads; `stats` and `peek` look at it.

Conversations: `conversations` brings records to one form, `subsample` chooses among them, `chat` packs them, `refine`
has their answers improved. `decontaminate` keeps test sets out of both kinds. `trove_script`, `trove` and `merge` run a
recipe on many machines through datatrove.
"""
