"""Context-parallel attention, the tiled loss and packed rows for `transformers.Trainer` and TRL's `SFTTrainer`.

>>> model = AutoModelForCausalLM.from_pretrained("long", attn_implementation="ultralong")
>>> tile_loss(model)
>>> collator = ContextParallelCollator(model.config)
>>> arguments = TrainingArguments("out", max_steps=2, report_to="none", use_cpu=True, **trainer_arguments())
>>> rows = shared_rows(packed_rows(["rows"], count=2), context_parallel_size=1)
>>> trainer = Trainer(model, arguments, collator, rows, callbacks=[ContextParallelCallback(collator)])
>>> trainer.train().global_step
2

Started by `torchrun --nproc-per-node 8` with `context_parallel_size=8` at both places, eight processes share each row.
"""

from ultralong.training.huggingface.callback import ContextParallelCallback, trainer_arguments
from ultralong.training.huggingface.collator import ContextParallelCollator
from ultralong.training.huggingface.loss import tile_loss
from ultralong.training.huggingface.rows import packed_rows, shared_rows

__all__ = [
    "ContextParallelCallback",
    "ContextParallelCollator",
    "packed_rows",
    "shared_rows",
    "tile_loss",
    "trainer_arguments",
]
