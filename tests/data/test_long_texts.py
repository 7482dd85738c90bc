"""Long texts in parts: the ids of the whole, whatever the tokenizer's kind, in memory that does not follow the text."""

from __future__ import annotations

import random
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ultralong.data.read.documents import Document
from ultralong.data.tokens import encoding, long_texts
from ultralong.data.tokens.encoding import make_encoder
from ultralong.data.tokens.long_texts import cut_text
from ultralong.data.tokens.tokenize import tokenize_corpus

DRAW = random.Random(0)
WORDS = [
    "the",
    "tide",
    "came",
    "in",
    "at",
    "dawn;",
    "a",
    "lantern's",
    "light",
    "fell",
    "on",
    "1,200",
    "wet",
    "stones,",
    "and",
    "nobody",
    "(not",
    "even",
    "she)",
    "saw",
    "it.",
]


def prose(words: int) -> str:
    return "".join(DRAW.choice(WORDS) + DRAW.choice([" ", " ", " ", "  ", "\n", "\n\n", " \n\t"]) for _ in range(words))


CORPUS = [prose(400) for _ in range(20)] + ["a" * 64, "-" * 70, "日本語の文章。" * 30, "x = [1, 2]; y(3)" * 40]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_level(pattern: str) -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    return made


def whole_text_bpe(prepend: bool) -> Tokenizer:
    """BPE over the whole text, as SentencePiece makes it: Llama 2 puts a mark in front of a text, Gemma does not."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    marks = [normalizers.Prepend("\u2581")] if prepend else []
    made.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "\u2581")])
    texts = [text[:120] for text in CORPUS]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False))
    return made


def unigram(scheme: str) -> Tokenizer:
    """A unigram model with words marked, as in T5 and XLM-R."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    made.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
    )
    return made


def word_pieces() -> Tokenizer:
    """Pieces of lower-case words, as in BERT; white space is gone and ends of texts are stripped."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.Sequence([normalizers.BertNormalizer(), normalizers.Strip()])
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    )
    return made


MAKERS = {
    "byte-level as GPT-2": lambda: byte_level(GPT2),
    "byte-level as Llama 3": lambda: byte_level(LLAMA3),
    "whole text as Llama 2": lambda: whole_text_bpe(True),
    "whole text as Gemma": lambda: whole_text_bpe(False),
    "unigram as T5": lambda: unigram("always"),
    "unigram, first word": lambda: unigram("first"),
    "pieces as BERT": word_pieces,
}
TEXTS = {
    "prose": prose(3000),
    "no spaces": "".join(DRAW.choice("的一是不了人我在有他这为之大来以个中上们。") for _ in range(12_000)),
    "base64": "".join(DRAW.choice("ABCDEFGHabcdefgh0123456789+/") for _ in range(9000)),
    "runs": " ".join(
        DRAW.choice(["a" * 900, " " * 700, "-" * 800, "\n" * 500, "7" * 1001, "one two"]) for _ in range(60)
    ),
    "one run": "a" * 9000,
    "digits": "7" * 9001,
    "accents": "".join(
        DRAW.choice(["e\u0301 ", "nai\u0308ve ", "\ufb01", "it's ", "\r\n", "\u200d", "\u2167 "]) for _ in range(5000)
    ),
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    return PreTrainedTokenizerFast(tokenizer_object=MAKERS[request.param]())


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("part", [700, 3000])
def test_the_parts_ids_are_the_wholes(tokenizer, name, part):
    text, encode = TEXTS[name], encoding._ids_encoder(tokenizer)
    cuts = encoding._safe_cuts(tokenizer)
    parts = list(cut_text(text, encode, part, cuts))
    assert [p.start for p in parts] == [0, *(p.end for p in parts[:-1])]
    assert parts[-1].end == len(text)
    ids = [id for p in parts for id in encode([text[p.start - p.context : p.end]])[0][p.context_ids :]]
    assert ids == encode([text])[0]
    if name == "prose" or (name in ("base64", "no spaces") and cuts == "anywhere"):
        assert max(p.end - p.start for p in parts) < 3 * part, "it is cut"


def test_a_unigram_models_texts_are_cut_between_words_alone():
    pieces = [("<unk>", 0.0), ("\u2581", -3.0), ("x", -4.1), ("-", -2.3), ("-" * 14, -3.7), ("-" * 3, -2.9)]
    made = Tokenizer(models.Unigram(pieces, 0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    encode, cuts = encoding._ids_encoder(tokenizer), encoding._safe_cuts(tokenizer)
    text = " ".join(f"{'x' * before}{'-' * count}" for before in range(40) for count in (700, 803, 905))
    parts = list(cut_text(text, encode, 500, cuts))
    assert len(parts) > 50
    assert all(text[part.start] == " " for part in parts[1:])
    ids = [id for p in parts for id in encode([text[p.start - p.context : p.end]])[0][p.context_ids :]]
    assert ids == encode([text])[0]


def test_no_cut_stands_within_a_run_not_even_behind_its_first_character():
    text = "one two " + "-" * 40 + " three"
    assert [long_texts._in_repetition(text, cut) for cut in (8, 9, 10, 30, 46, 47, 48)] == [
        *[False, True, True, True, True, True, False]
    ]


def test_a_unigram_model_over_the_whole_text_is_not_cut():
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), (" ", -1.0)], 0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert encoding._safe_cuts(tokenizer) == "nowhere"
    assert len(list(cut_text("a " * 5000, encoding._ids_encoder(tokenizer), 500, "nowhere"))) == 1


@given(data=st.lists(st.sampled_from(["a", "ab", " ", "\n", "7", "the ", "日", "-", "e\u0301", "it's"]), max_size=60))
def test_any_text_that_repeats_itself(data):
    text = "".join(data) * 40
    for maker in ("byte-level as Llama 3", "whole text as Llama 2"):
        made = PreTrainedTokenizerFast(tokenizer_object=_made(maker))
        encode = encoding._ids_encoder(made)
        ids = [
            id
            for p in cut_text(text, encode, 400)
            for id in encode([text[p.start - p.context : p.end]])[0][p.context_ids :]
        ]
        assert ids == encode([text])[0]


def _made(name, kept={}):  # noqa: B006 - trained once
    return kept.setdefault(name, None) or kept.update({name: MAKERS[name]()}) or kept[name]


def test_a_corpus_with_long_documents_is_the_same_store(tokenizer, tmp_path, monkeypatch):
    documents = [
        Document("short", prose(20)),
        Document("long", TEXTS["prose"]),
        Document("none", ""),
        Document("b", "x"),
    ]
    before = tokenize_corpus(documents, tokenizer, tmp_path / "whole", quiet=True)
    monkeypatch.setattr(encoding, "LONG", 500)
    monkeypatch.setattr(long_texts.cut_text, "__defaults__", (900, "anywhere"))
    after = tokenize_corpus(documents, tokenizer, tmp_path / "parts", quiet=True)
    assert [ids.tolist() for ids in after] == [ids.tolist() for ids in before]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


def test_python_tokenizers_are_cut_too(tiny_tokenizer, monkeypatch):
    class Slow:
        is_fast = False

        def __len__(self) -> int:
            return len(tiny_tokenizer)

        def get_vocab(self) -> dict[str, int]:
            return tiny_tokenizer.get_vocab()

        def __call__(self, text, **options):
            assert len(text) < 2000, "never the whole text"
            return {"input_ids": tiny_tokenizer(text, add_special_tokens=False)["input_ids"]}

    monkeypatch.setattr(encoding, "LONG", 500)
    monkeypatch.setattr(long_texts.cut_text, "__defaults__", (900, "anywhere"))
    (ids,) = make_encoder(Slow())([TEXTS["prose"]])
    assert ids.tolist() == tiny_tokenizer(TEXTS["prose"], add_special_tokens=False)["input_ids"]


def test_memory_does_not_follow_the_longest_document(tmp_path, python):
    """6 MB in one document; encoded at once they take about 1 GB."""
    PreTrainedTokenizerFast(tokenizer_object=_made("byte-level as Llama 3")).save_pretrained(tmp_path)
    script = (
        "import resource, sys\n"
        "from ultralong.data.tokens.encoding import load_tokenizer, make_encoder\n"
        "encode = make_encoder(load_tokenizer(sys.argv[1]))\n"
        "text = 'the tide came in at dawn; nobody saw it. ' * 150_000\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "ids = encode([text])[0]\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, ids.size)"
    )
    done = subprocess.run([python, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, ids = map(int, done.stdout.split())
    assert ids > 1_000_000
    assert peak < 500


def test_a_long_run_is_looked_at_in_growing_steps():
    calls = 0

    def encode(texts):
        nonlocal calls
        calls += len(texts)
        return [np.diff(np.append(np.arange(0, len(text), 8), len(text))).tolist() for text in texts]

    (part,) = cut_text("a" * 2_000_000, encode, 1 << 14)
    assert (part.start, part.end) == (0, 2_000_000)
    assert calls < 200_000
