"""A row's padding is a document of its own to the trainer, which attends inside it, and so to the plan of its work.

Only packs of dynamic context parallelism leave it out, in the trainer and in the plan alike.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_run import make_run

from ultralong.data.rows.packed_rows import PADDING, PackedRows
from ultralong.data.rows.packing import PackSettings, pack
from ultralong.data.tokens.store import TokenStore
from ultralong.planner import rows as planned
from ultralong.training.batches import RowOrder
from ultralong.training.config import ParallelConfig
from ultralong.training.throughput import query_key_pairs

LENGTH = 4096  # of which the documents of the run fill one and a part


@pytest.fixture
def config(tmp_path, tiny_model, tiny_tokenizer):
    made = make_run(tmp_path, tiny_model, tiny_tokenizer)
    settings = PackSettings(LENGTH, tail="pad", mask_documents=True)
    pack(TokenStore(tmp_path / "tokens"), tiny_tokenizer, tmp_path / "padded", settings, quiet=True)
    return replace(made, data=(replace(made.data[0], rows=str(tmp_path / "padded")),), steps=1)


def test_the_plan_counts_the_padding_that_the_trainer_attends_over(config):
    rows = PackedRows(config.data[0].rows)
    assert rows[-1 % len(rows)].document_ids[-1] == PADDING
    made = planned.planned_rows(config.data)
    order = RowOrder.of_run(replace(config, global_batch_size=len(rows)))
    batch = order.batch(0, len(rows))
    assert made.length == LENGTH
    assert {edges[-1] for edges in made.documents} == {LENGTH}
    assert sum(query_key_pairs(0, edges) for edges in made.documents) == query_key_pairs(0, batch.boundaries)


def test_packs_leave_it_out_in_both(config):
    rows, parallel = PackedRows(config.data[0].rows), ParallelConfig(dynamic_context_parallel=True)
    order = RowOrder.of_run(replace(config, parallel=parallel, global_batch_size=len(rows)))
    packs = order.packs(0, len(rows), 1, LENGTH, 1.0)
    kept = [rows.documents(number)[-1] for number in range(len(rows))]
    assert kept[-1] < LENGTH
    assert packs.tokens == sum(kept)
    trained = [order.pack(pack).boundaries for each in packs.passes for pack in each]
    assert sum(int(edges[-1]) for edges in trained) == packs.tokens
    assert sum(query_key_pairs(0, edges) for edges in trained) == packs.pairs
