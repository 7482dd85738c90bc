"""Fixtures for every test: one thread, a tiny Llama and a tiny byte-level tokenizer, both made here from nothing."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

gc.disable()  # until everything is imported and collected: what is made till then stays

# Before transformers is imported, which reads it once: a test that needs the network would fail elsewhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# jsonschema, which nbformat imports, builds a parser with it, four seconds for a format that nothing here uses; where
# its import fails it does without.
sys.modules["rfc3987_syntax"] = None

import pytest
import torch
from hypothesis import settings
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Several threads in each of several test processes wait for each other; the tensors here are too small to gain by it.
torch.set_num_threads(1)

# Among processes of one gloo group, one that wakes another to receive must not be stopped by it in the middle of
# sending, with the connection locked: the other polls until it is free, half of the system's time of such tests.
if sys.platform == "linux":
    with suppress(PermissionError):  # a container may forbid it; only time is lost
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

# A deadline on a shared machine measures the neighbours; the same examples each time keep a red test red.
settings.register_profile("ultralong", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ultralong")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what is imported and collected out of later garbage collections, and put it into large pages.

    accelerate collects garbage after each training run: half a second each time over the millions of objects that
    torch, transformers and the tests make, and a forked process copies each page that a collection touches.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    if len(session.items) > MANY:
        use_large_pages()


MANY = 30  # tests that fork often enough to earn back a second


def use_large_pages() -> None:
    """Join this process's memory into pages of 2 MiB, where Linux does that.

    A fork copies the table of pages, and its end frees the copy: 65 ms for the 850 MB of a test process, 12 ms after
    this. Tests fork more than a thousand times.
    """
    if sys.platform != "linux":
        return
    libc, size = ctypes.CDLL(None), 1 << 21
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, rights, _, _, file, *name = line.split()
        if rights == "rw-p" and file == "0" and name in ([], ["[heap]"]):
            begin, end = (int(edge, 16) for edge in place.split("-"))
            begin, end = -(-begin // size) * size, end // size * size
            for advice in (14, 25):  # MADV_HUGEPAGE, MADV_COLLAPSE; a kernel that lacks the second refuses
                if end > begin:
                    libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)


BOS, EOS, START, END, TURN = "<|bos|>", "<|eos|>", "<|start|>", "<|end|>", "<|turn|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    f"{START}"
    "{{ message['role'] }}"
    f"{END}\n"
    "{{ message['content'] | trim }}"
    f"{TURN}"
    "{% endfor %}{% if add_generation_prompt %}"
    f"{START}assistant{END}\n"
    "{% endif %}"
)
TRAINING_TEXT = (
    "The lighthouse keeper wrote in his log that the tide came in at dawn, and that no ship had passed.",
    "A window of tokens is what a model can see at once; beyond it, nothing was ever said.",
    "def frequencies(base, size):\n    return [base ** (-2 * i / size) for i in range(size // 2)]\n",
    "Numbers: 0 1 2 3 4 5 6 7 8 9, 10, 128, 1024, 8192, 131072, 1048576. Questions? Answers!",
    "user: where is the key? assistant: the key is under the third stone. system: answer in short sentences.",
    "Gr\u00fc\u00dfe aus K\u00f6ln, caf\u00e9, na\u00efve, \u65e5\u672c\u8a9e, emoji \U0001f642.",
    "Marks that a corpus holds: <s> </s> <br/> & ## ``` --- \t ...",
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens that starts a text with its own token and has a chat template, as Llama-3's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        TRAINING_TEXT,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[BOS, EOS, START, END, TURN],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[START, END, TURN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


@pytest.fixture(scope="session")
def tokenizer_of_words() -> PreTrainedTokenizerFast:
    """Words, numbers and marks as whole tokens: about as many tokens a text as a real tokenizer gives."""
    core = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    # One pass over the text: words, numbers and marks one after the other took two, and a third more time.
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|[^\W\d]+|[^\w\s]+"), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., LlamaForCausalLM]:
    """A function from config overrides (and a seed) to a new random Llama of about 0.1 M parameters."""

    def make(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
        settings = {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": None,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()

    return make


@pytest.fixture(scope="session", autouse=True)
def _forked_helpers() -> Iterator[None]:
    """The planner's other process, and the one that renders chat templates, are forked and not started anew."""
    from forked import forked_planner, forked_renderer

    with forked_planner(), forked_renderer():
        yield


@pytest.fixture
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A program like `sys.executable` in which everything is imported: modules and `-c` start at once."""
    from command_server import served

    folder = tmp_path_factory.mktemp("bin")
    with served(folder):
        yield str(folder / "python")


@pytest.fixture
def tiny_model(make_tiny_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """A new tiny Llama for each test, so that a test may change it."""
    return make_tiny_model()
