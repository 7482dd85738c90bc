"""Documents become tokens, tokens become packed rows.

The rooms, each of which may import those before it: `read` (documents and conversations from files, archives,
registries and datasets), `select` (the length rule, cleaning, decontamination), `tokens` (tokenizing into
shards), `rows` (separator packing: rows of exactly the target length), `chat` (conversations to tokens and a loss mask;
sub-sampling, refinement) and `recipe` (all of it from one YAML file, on one machine or on many through datatrove).

`rows.packed_rows.PackedRows` is what training reads; `rows.inspect_rows` and `recipe.stats` show what is in there.
"""
