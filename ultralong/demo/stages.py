"""The demo's stages: each leaves its result in the demo's folder, and is not done again when it is there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ultralong import miniature
from ultralong.checkpoints.extend import extend
from ultralong.data.chat.pack import ChatSettings, pack_chat
from ultralong.data.chat.synthetic_qa import synthetic_qa_conversations
from ultralong.data.read.conversations import Conversation, Message
from ultralong.data.recipe.build import pack_recipe
from ultralong.data.recipe.schema import find_recipe
from ultralong.data.recipe.texts import read_conversations, read_documents
from ultralong.data.rows.packed_rows import PackedRows
from ultralong.demo.settings import DemoConfig, DemoStage
from ultralong.evaluation.measures.needle import needle_grid
from ultralong.evaluation.measures.perplexity import perplexity_by_position
from ultralong.evaluation.tasks.haystack import Haystack
from ultralong.evaluation.tasks.needle import make_needle
from ultralong.inference.load import load_model
from ultralong.launch.local import launch_local
from ultralong.rope import window_of
from ultralong.training.config import DataSource, OptimizerConfig, ParallelConfig, TrainConfig
from ultralong.training.loop import train
from ultralong.utils import settings
from ultralong.utils.files import read_json, write_json

PLAIN_CHECK = """
import gc, json, sys
gc.disable()  # all that is imported stays
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1], json.load(sys.stdin)
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
device = "cuda" if torch.cuda.is_available() else "cpu"
ids = torch.tensor([prompt], device=device)
out = model.to(device).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
assert "ultralong" not in sys.modules
print(json.dumps(tokenizer.decode(out[0, len(prompt):], skip_special_tokens=True)))
gc.freeze()  # nor is it looked through at the end
"""


@dataclass
class Demo:
    """The stages. Each can be called alone, in this order; what an earlier call left in `out` is used.

    Attributes:
        config: What to do.
        out: Where everything goes.
        quiet: No progress bars.
    """

    config: DemoConfig
    out: Path
    quiet: bool = False
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        kept = self.out / "demo.yaml"
        if kept.exists() and settings.load(DemoConfig, kept) != self.config:
            raise ValueError(
                f"{self.out} holds a demo with other settings. Remove it, or choose another folder (--out)."
            )
        settings.save(self.config, kept)

    def stages(self) -> list[tuple[str, Callable[[], Any]]]:
        """Titles and methods in order."""
        return [
            (f"the model: {self.config.model}", self.base),
            ("documents -> tokens -> rows joined by the separator", self.rows),
            ("before: needles and perplexity of the base model", lambda: self.measure("base")),
            (f"RoPE rescaled in one step to {self.config.target:,} tokens", self.extended),
            ("rescaled only: needles and perplexity before any training", lambda: self.measure("extended")),
            ("continued pretraining on rows of the new length", self.pretrained),
            ("short SFT", self.tuned),
            ("after: needles and perplexity of the extended model", lambda: self.measure("tuned")),
            ("does plain transformers open it?", self.plain_answer),
        ]

    @property
    def device(self) -> str:
        """Where evaluation runs."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    def base(self) -> Path:
        """Folder of the model to extend."""
        if self.config.model == "miniature":
            return miniature.path()
        if self.config.model == "smollm2":
            from ultralong.demo.models import smollm2

            return smollm2(self.out / "base")
        return Path(self.config.model)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return AutoTokenizer.from_pretrained(self.base())

    def base_window(self) -> int:
        """Window of the base model, in tokens."""
        return window_of(read_json(self.base() / "config.json"))

    def rows(self) -> PackedRows:
        """Documents, tokenised and packed into rows of the new length, joined by the separator, no mask."""
        config = self.config
        into = self.out / "rows"
        pack_recipe(config.documents, self.tokenizer(), config.target, into, limit=config.limit, quiet=self.quiet)
        return PackedRows(into)

    def busiest_rows(self, count: int) -> list[list[int]]:
        """Document boundaries of the rows that hold most documents: a long document fills many rows alone."""
        rows = self.rows()
        boundaries = sorted((rows[i].boundaries.tolist() for i in range(len(rows))), key=len, reverse=True)
        return boundaries[:count]

    def heldout(self) -> PackedRows:
        """Held-out documents in rows of the new length."""
        pack_recipe(self.config.heldout, self.tokenizer(), self.config.target, self.out / "heldout", quiet=True)
        return PackedRows(self.out / "heldout")

    def extended(self) -> Path:
        """The base model with RoPE rescaled and nothing trained."""
        out = self.out / "extended"
        if not out.exists():
            config = self.config
            report = extend(
                self.base(), config.target, out, config.method, factor=config.factor, beta=config.beta, quiet=True
            )
            write_json(self.out / "extend.json", report.to_dict())
        return out

    def pretrained(self) -> Path:
        """The extended model after continued pretraining, sequence-parallel."""
        processes = self.config.processes or max(1, torch.cuda.device_count() or 2)
        return self._trained("pretraining") or self._train(
            "pretraining", self.extended(), self.rows().folder, self.config.pretraining, processes
        )

    def chat_rows(self) -> PackedRows:
        """Conversations and questions about passages, none longer than the old window, packed under their masks."""
        tokenizer, window = self.tokenizer(), self.base_window()
        questions = int(self.config.examples * self.config.questions)
        texts = [document.text for document in read_documents(find_recipe(self.config.documents), quiet=True)]
        mixed: list[Conversation | list[Message]] = list(
            synthetic_qa_conversations(texts, tokenizer, count=questions, max_tokens=window, seed=self.config.seed)
        )
        for conversation in read_conversations(find_recipe(self.config.conversations), quiet=True):
            if len(mixed) >= self.config.examples:
                break
            mixed.append(conversation.messages)
        chat = ChatSettings(length=window, max_tokens=window, seed=self.config.seed)
        return pack_chat(mixed, tokenizer, self.out / "chat-rows", chat, quiet=True)

    def tuned(self) -> Path:
        """The extended, pretrained model after short SFT."""
        return self._trained("tuning") or self._train(
            "tuning", self.pretrained(), self.chat_rows().folder, self.config.tuning, 1, "sft"
        )

    def measure(self, which: str) -> dict[str, Any]:
        """Needle grid and perplexity by position of a stage's model.

        Args:
            which: `base`, `extended`, `pretrained` or `tuned`.

        Returns:
            `needle`: cells as `needle_grid` gives them, `perplexity`: bins as `perplexity_by_position` gives them.
        """
        path = self.out / "measured" / f"{which}.json"
        if path.exists():
            return read_json(path)
        model, tokenizer = self._open(getattr(self, which)()), self.tokenizer()
        config = self.config
        needle = needle_grid(
            model,
            tokenizer,
            config.lengths,
            config.depths,
            config.samples,
            config.seed,
            self._haystack,
            chunk=config.chunk,
            quiet=self.quiet,
        )
        rows = self.heldout()
        chosen = [rows[index] for index in range(min(len(rows), config.perplexity_rows))]
        edges = [config.target * i // 16 for i in range(17)]
        perplexity = perplexity_by_position(
            model, chosen, edges, chunk=config.chunk, seed=config.seed, quiet=self.quiet
        )
        write_json(path, {"needle": needle, "perplexity": perplexity})
        return read_json(path)

    def plain_answer(self) -> dict[str, Any]:
        """Ask the final checkpoint one needle at the full new window, with plain transformers in a new interpreter.

        Raises:
            RuntimeError: transformers could not open or run it; the message holds what it said.
        """
        needle = make_needle(self.tokenizer(), self.config.target, 0.1, self.config.seed + 1, self._haystack)
        prompt = needle.input_ids.tolist()
        done = subprocess.run(
            [sys.executable, "-c", PLAIN_CHECK, str(self.tuned())],
            input=str(prompt),
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"plain transformers could not use {self.tuned()}:\n{done.stderr[-2000:]}")
        answer = {
            "expected": needle.answer,
            "answered": json.loads(done.stdout.splitlines()[-1]),
            "tokens": self.config.target,
        }
        write_json(self.out / "plain.json", answer)
        return answer

    @cached_property
    def _haystack(self) -> Haystack:
        texts = [document.text for document in read_documents(find_recipe(self.config.heldout), quiet=True)]
        return Haystack.from_texts(self.tokenizer(), texts, limit=4 * self.config.target, name="held-out documents")

    def _open(self, folder: Path) -> PreTrainedModel:
        return load_model(folder, self.device, torch.bfloat16 if self.device == "cuda" else torch.float32)

    def _trained(self, name: str) -> Path | None:
        """The model of a training that has ended."""
        return self.out / name / "model" if (self.out / name / "result.json").exists() else None

    def _train(
        self, name: str, model: Path, rows: Path, stage: DemoStage, processes: int, command: str = "train"
    ) -> Path:
        out = self.out / name
        optimizer = OptimizerConfig(lr=stage.lr, warmup_steps=max(1, stage.steps // 10), schedule="linear")
        config = TrainConfig(
            model=str(model),
            out=str(out),
            data=(DataSource(str(rows)),),
            steps=stage.steps,
            global_batch_size=stage.global_batch_size,
            micro_batch_size=stage.micro_batch_size,
            seed=self.config.seed,
            dtype="bfloat16" if self.config.dtype == "bfloat16" else "float32",
            save_every=max(1, stage.steps // 2),
            keep=1,
            optimizer=optimizer,
            parallel=ParallelConfig(context_parallel_size=processes),
        )
        settings.save(config, self.out / f"{name}.yaml")
        resume = (out / "config.yaml").exists()
        if processes == 1 and self.device == "cpu":  # a new interpreter would take longer to start than a short run
            train(config, resume=resume, quiet=self.quiet, answers=command == "sft")
        else:
            launch_local(self.out / f"{name}.yaml", processes, resume=resume, quiet=self.quiet, command=command)
        return out / "model"
