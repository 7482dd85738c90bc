"""A tokenizer.json that means harm, or is damaged, is one line before anything is tokenised or copied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ultralong import miniature
from ultralong.checkpoints.config import check_whole
from ultralong.checkpoints.extend import extend
from ultralong.data.recipe.rate import measured
from ultralong.data.tokens.encoding import load_tokenizer as load_local
from ultralong.data.tokens.encoding import make_encoder, tokenizer_fingerprint
from ultralong.utils import hub
from ultralong.utils.files import read_json
from ultralong.utils.hub import check_tokenizer, load_tokenizer


@pytest.fixture
def model(tmp_path) -> Path:
    """The miniature with a tokenizer of bytes."""
    folder = tmp_path / "m"
    shutil.copytree(miniature.path(), folder)
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"})
    )
    return folder


def _change(folder: Path, change) -> None:
    entries = read_json(folder / "tokenizer.json")
    change(entries)
    (folder / "tokenizer.json").write_text(json.dumps(entries))


def _replace(pattern: str, by: str) -> dict:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": by}


CHANGES = {
    "an id below 0": (lambda e: e["model"]["vocab"].update(a=-1), "the id -1, which is none"),
    "an id that is no number": (lambda e: e["model"]["vocab"].update(a="7"), "the id 7, which is none"),
    "an id of 2**40": (lambda e: e["model"]["vocab"].update(a=2**40), "the id 1099511627776, which is none"),
    "an id of 2**24": (lambda e: e["model"]["vocab"].update(a=2**24), "the id 16777216, which is none"),
    "an id of 2**31 - 1": (lambda e: e["model"]["vocab"].update(a=2**31 - 1), "the id 2147483647, which is none"),
    "an id of two letters": (lambda e: e["model"]["vocab"].update(a=e["model"]["vocab"]["b"]), "to 'a' and 'b'"),
    "an added token's id of a letter": (
        lambda e: e["added_tokens"].append({"id": 5, "content": "tide"}), "gives the id 5 to '&' and 'tide'",
    ),
    "an added token without a text": (lambda e: e["added_tokens"].append({"id": 300, "content": ""}), "without a text"),
    "added tokens that are none": (lambda e: e.update(added_tokens=[5]), "without a text"),
    "a model that is none": (lambda e: e.update(model=[]), "its model is a list"),
    "a normalizer of 100**4": (
        lambda e: e.update(normalizer={"type": "Sequence", "normalizers": [_replace("e", "e" * 100)] * 4}),
        "a normalizer that may lengthen a text 100,000,000 times",
    ),
    "a normalizer of 2**60": (
        lambda e: e.update(normalizer={"type": "Sequence", "normalizers": [_replace("e", "ee")] * 60}),
        "a normalizer that may lengthen",
    ),
    "a decoder of 1,000": (
        lambda e: e.update(decoder={"type": "Sequence", "decoders": [_replace("a", "a" * 1000)]}),
        "a decoder that may lengthen a text 1,000 times",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_refused_wherever_it_is_opened_or_copied(model, tmp_path, name):
    change, said = CHANGES[name]
    _change(model, change)
    for use in (check_tokenizer, load_tokenizer, load_local, check_whole, lambda m: extend(m, "2x", tmp_path / "o")):
        with pytest.raises(ValueError, match=said) as told:
            use(model)
        assert "\n" not in str(told.value)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("normalizer", [_replace(" ", "\u2581"), {"type": "NFKC"}, {"type": "Sequence",
                         "normalizers": [_replace("a", "aaaa"), {"type": "Lowercase"}]}, None])  # fmt: skip
def test_what_tokenizers_do_is_taken(model, normalizer):
    _change(model, lambda entries: entries.update(normalizer=normalizer))
    assert load_local(model)
    check_whole(model)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", '{"model": {"type": "BPE"}}'),
        ("tokenizer.json", '{"model": {"type": "None"}, "added_tokens": []}'),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": 5}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
    ],
)
def test_what_transformers_cannot_open_is_one_line_and_is_not_extended(model, tmp_path, file, content):
    (model / file).write_text(content)
    for use in (load_tokenizer, load_local, lambda m: extend(m, "2x", tmp_path / "o")):
        with pytest.raises(ValueError, match="tokenizer"):
            use(model)


def test_a_pattern_that_is_none_and_one_that_is_given_up(model):
    def split(pattern):
        steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]
        bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return lambda e: e.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [*steps, bytes_]})

    _change(model, split("("))
    with pytest.raises(ValueError, match="the tokenizers library refuses it"):
        load_local(model)
    _change(model, split(r"(([a-z ])+.)+[A-Z]([a-z])+\z|(x+x+)+y"))
    tokenizer, text = load_local(model), "the tide came in and no ship had passed " * 4
    for use in (lambda: make_encoder(tokenizer)([text]), lambda: measured([text], tokenizer)):
        with pytest.raises(ValueError, match="the tokenizer fails at a text"):
            use()


def test_a_file_of_gigabytes_is_not_read(model, monkeypatch):
    monkeypatch.setattr(hub, "LARGEST_TOKENIZER", 1000)
    for use in (check_tokenizer, load_tokenizer, load_local):
        with pytest.raises(ValueError, match="and no tokenizer has more than 1,000"):
            use(model)


@pytest.mark.parametrize("number", [300, 70_000, 2**24 - 1])
def test_ids_beyond_the_number_of_pieces_are_kept(model, number):
    """The type of a store followed the number of pieces, and an id beyond it was an OverflowError."""
    _change(model, lambda entries: entries["model"]["vocab"].update(a=number))
    tokenizer = load_local(model)
    assert number in make_encoder(tokenizer)(["abc"])[0].astype(np.int64).tolist()
    assert tokenizer_fingerprint(tokenizer)["vocabulary"] == number + 1
