"""A search: scores are those of the written checkpoint, factors stay in their bounds, a stopped search is the same."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny_run import make_run
from ultralong.cli import main
from ultralong.rope import from_config, inverse_frequencies
from ultralong.search.run import alike, options_of, search, table_lines, write
from ultralong.search.score import Scorer, scaled
from ultralong.search.settings import SearchSettings
from ultralong.search.space import Genome, children, cross, first_generation, grid, mutate, scaling_of
from ultralong.utils import settings
from ultralong.utils.files import read_json, read_jsonl

WINDOW, TO = 128, 512


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_tiny_model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("search")
    model = make_tiny_model(3, num_hidden_layers=1, max_position_embeddings=WINDOW, vocab_size=len(tiny_tokenizer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12)  # attention that cares where keys are
    config = make_run(folder, model, tiny_tokenizer)
    config = replace(config, model=str(folder / "model"), data=(replace(config.data[0], rows=str(folder / "rows")),))
    settings.save(config, folder / "train.yaml", "")
    return folder


@pytest.fixture(scope="module")
def wanted(made):
    return SearchSettings(
        str(made / "model"),
        TO,
        depths=(0.2, 0.8),
        samples=1,
        population=6,
        parents=3,
        generations=2,
        betas=(4.0,),
        seed=5,
    )


@pytest.fixture(scope="module")
def whole(wanted, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "search"
    return search(wanted, out, device="cpu", quiet=True), out


@pytest.mark.parametrize(
    "method",
    ["longrope", *(pytest.param(name, marks=pytest.mark.soak) for name in ("yarn", "llama3", "ntk", "linear"))],
)
def test_a_trial_scores_what_plain_transformers_says_of_the_written_checkpoint(wanted, whole, tmp_path, method):
    result, _ = whole
    trial = next(trial for trial in result["trials"] if trial["method"] == method)
    write(wanted, trial["options"], tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    from ultralong.inference.load import load_model_and_tokenizer

    scorer = Scorer(*load_model_and_tokenizer(wanted.model, "cpu"), wanted)
    nats = tokens = 0
    for needle in scorer.needles:
        ids = torch.tensor([*needle.input_ids.tolist(), *needle.answer_ids])[None]
        assert ids.shape[1] == TO
        with torch.no_grad():
            logits = model(ids).logits[0, -len(needle.answer_ids) - 1 : -1].double()
        nats += float(cross_entropy(logits, torch.tensor(needle.answer_ids), reduction="sum"))
        tokens += len(needle.answer_ids)
    assert trial["scores"]["needles"] == pytest.approx(nats / tokens, rel=2e-5)
    assert abs(result["unscaled"]["needles"] - trial["scores"]["needles"]) > 1e-4


def test_longrope_factors_are_read_by_transformers_and_leave_short_texts_alone(wanted, whole, tmp_path):
    best = next(trial for trial in whole[0]["trials"] if trial["method"] == "longrope")
    write(wanted, best["options"], tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    written = config.rope_parameters
    assert written["long_factor"] == best["options"]["long_factors"]
    assert written["short_factor"] == [1.0] * 8
    assert (written["original_max_position_embeddings"], config.max_position_embeddings) == (WINDOW, TO)
    plain = from_config(AutoConfig.from_pretrained(wanted.model))
    assert torch.equal(inverse_frequencies(from_config(config), WINDOW)[0], inverse_frequencies(plain)[0])


def test_a_table_is_given_back(made):
    model = AutoModelForCausalLM.from_pretrained(made / "model").eval()
    ids = torch.arange(2, 200)[None]
    before = model(ids).logits
    scaling = scaling_of(Genome((4.0, 5.0, 6.0), 8, False), model.config, TO)
    with scaled(model, scaling, TO):
        assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    assert torch.equal(model(ids).logits, before)


def ordered(genome, ratio):
    factors = genome.factors()
    return (
        len(factors) == 8
        and all(a <= b + 1e-6 for a, b in pairwise(factors))
        and factors[0] == 1
        and all(ratio - 1e-6 <= x <= 2 * ratio + 1e-6 for x in factors[genome.critical :])
    )


def test_genomes_stay_monotone_and_within_their_bounds(made, wanted):
    config, ratio = AutoConfig.from_pretrained(made / "model"), TO / WINDOW
    born = first_generation(config, replace(wanted, population=40))
    assert len(born) == 40
    assert {genome.critical for genome in born} >= {1, 2, 3}  # theory says 3 of 8 pairs for 128 tokens
    assert all(ordered(genome, ratio) for genome in born)
    draw = np.random.default_rng(0)
    for _ in range(200):
        one, other = (born[int(place)] for place in draw.integers(0, 40, 2))
        changed, mixed = mutate(one, draw, ratio, True), cross(one, other, draw, ratio)
        assert ordered(changed, ratio)
        assert ordered(mixed, ratio)
        assert mixed.critical == one.critical
        assert mutate(one, draw, ratio, False).critical == one.critical
    assert children(born[:5], 3, wanted, ratio) == children(born[:5], 3, wanted, ratio)
    assert children(born[:5], 3, wanted, ratio) != children(born[:5], 4, wanted, ratio)


def test_the_grid_holds_every_method_and_setting_once(made, wanted):
    config = AutoConfig.from_pretrained(made / "model")
    found = grid(config, replace(wanted, betas=(4.0, 16.0), bases=(5e5,)))
    kinds = [(s.method, s.factor, s.beta, s.attention_factor) for s in found]
    assert len(set(kinds)) == len(kinds) == 2 * 2 * 2 + 2 * 2 + 2 + 2 + 1
    assert {(s.method, s.factor) for s in found if s.method == "ntk"} == {("ntk", 4.0), ("ntk", 8.0)}
    assert options_of(found[-1]) == {"method": "default", "theta": 5e5}


def test_a_stopped_search_does_the_rest_of_the_same(wanted, whole, tmp_path, monkeypatch):
    result, out = whole
    score, calls = Scorer.parts, []

    def stop_later(self, *arguments):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return score(self, *arguments)

    monkeypatch.setattr(Scorer, "parts", stop_later)
    with pytest.raises(KeyboardInterrupt):
        search(wanted, tmp_path / "cut", device="cpu", quiet=True)
    assert len(read_jsonl(tmp_path / "cut" / "trials.jsonl")) == 14
    again = search(wanted, tmp_path / "cut", device="cpu", quiet=True)
    assert len(calls) == 15 + len(read_jsonl(out / "trials.jsonl")) - 14

    def told(found):
        return [(trial["key"], trial["scores"], trial["generation"]) for trial in found["trials"]]

    assert told(again) == told(result)
    assert again["best"] == result["best"]
    assert result["trials"][0]["scores"]["needles"] == min(t["scores"]["needles"] for t in result["trials"])
    with pytest.raises(ValueError, match="holds another search"):
        search(replace(wanted, seed=6), tmp_path / "cut", device="cpu", quiet=True)


def test_the_command_scores_longppl_trains_the_best_and_writes_one(made, wanted, tmp_path, capsys):
    words = ["search", str(made / "model"), "--to", str(TO), "--methods", "ntk", "longrope", "--population", "4"]
    words += ["--parents", "2", "--generations", "1", "--samples", "1", "--depths", "0.5", "--factors", "1"]
    words += ["--train", str(made / "train.yaml"), "--steps", "2", "--finalists", "2", "--temperatures", "off"]
    words += ["--device", "cpu", "--quiet", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "found.json")]
    main([*words, "--write", str(tmp_path / "best")])
    said = capsys.readouterr().out
    found = read_json(tmp_path / "found.json")
    assert "after 2 steps of training" in said
    assert len(found["finalists"]) == 2
    assert all(math.isfinite(one["trained"]["needles"]) for one in found["finalists"])
    assert any(one["trained"] != one["before"] for one in found["finalists"])
    best = min(found["finalists"], key=lambda one: one["trained"]["needles"])
    assert found["best"] == best["options"]
    assert json.loads((tmp_path / "best" / "extend.json").read_text())["method"] == best["options"]["method"]
    assert "unscaled" in table_lines(found)[1]


def test_how_many_trials_cannot_be_told_from_the_best_is_said(whole):
    result, _ = whole
    for trial in result["trials"]:
        assert trial["scores"]["needles"] == pytest.approx(np.mean(trial["each"]["needles"]), rel=0.02)
    few = [{"each": {"needles": values}} for values in ([1, 2, 3, 4], [1.5, 2.5, 3.5, 4.5], [0, 4, 2, 9], [1, 2, 3, 4])]
    assert alike(few, "needles") == {"trials": 2, "samples": 4}
    assert alike([{"each": {"needles": [1]}}] * 3, "needles") == {"trials": 2, "samples": 1}, "one tells nothing apart"
    assert alike([*few, {"scores": {}}], "needles") is None, "of a search by an earlier version"
    others = len(result["trials"]) - 1
    said = f"{result['alike']['trials']} of the other {others} cannot be told from the first by 2 samples"
    assert said in "\n".join(table_lines(result))


def test_key_tokens_of_rows_can_give_the_order(made, wanted, tmp_path, make_tiny_model, tiny_tokenizer):
    from ultralong.data.rows.packing import PackSettings, pack
    from ultralong.data.tokens.store import TokenStore

    pack(TokenStore(made / "tokens"), tiny_tokenizer, tmp_path / "rows", PackSettings(length=256), quiet=True)
    asked = replace(
        wanted, methods=("ntk", "linear"), rows=str(tmp_path / "rows"), evaluator=wanted.model, objective="longppl",
        short_context=16, short_stride=16, key_alpha=0.05, key_beta=-9.0, max_rows=1,
    )  # fmt: skip
    found = search(asked, tmp_path / "out", device="cpu", quiet=True)
    scores = [trial["scores"]["longppl"] for trial in found["trials"]]
    assert scores == sorted(scores)
    assert len(set(scores)) == 4
    with pytest.raises(ValueError, match="LongPPL needs rows"):
        replace(asked, evaluator=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (100,)}, "beyond the 128 tokens of pretraining"),
        ({"critical": 8, "methods": ("longrope",)}, "critical must be a pair from 1 to 7"),
        ({"parents": 9}, "no more than population"),
        ({"factors": (0.5,)}, "at least 1"),
        ({"methods": ("su",)}, "RoPE method 'su' is unknown"),
        ({"methods": ()}, "at least one method"),
    ],
)
def test_what_cannot_be_searched_is_named(wanted, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        search(replace(wanted, **changes), tmp_path / "out", device="cpu", quiet=True)
