"""GGUF export around a stand-in for llama.cpp's converter: refusals, comparison, and what llama.cpp is told.

Also what is read of a GGUF file beside transformers' own reader: its special tokens.
"""

import copy
import json
import shutil

import pytest

from ultralong import cli
from ultralong.api.make import export_gguf as api_export
from ultralong.checkpoints.gguf import export_gguf, reading_options
from ultralong.demo.models import name_special_tokens
from ultralong.rope.scaling import RopeScaling

gguf = pytest.importorskip("gguf", reason="needs the gguf extra")

# Writes what the real one writes of a config's RoPE, or less where the config of the test says so.
CONVERTER = """
import json, sys
import gguf
folder, file = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1]
config = json.load(open(f"{folder}/config.json"))
assert not config.get("too_many_tokens")
if config.get("fails"):
    sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")
rope = config["rope_parameters"]
writer = gguf.GGUFWriter(file, "llama")
writer.add_context_length(config["max_position_embeddings"])
writer.add_rope_freq_base(rope["rope_theta"])
if rope["rope_type"] == "yarn":
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.get("wrong_factor", rope["factor"]))
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
if rope["rope_type"] == "linear":
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(rope["factor"])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.close()
"""


@pytest.fixture
def place(tmp_path, make_tiny_model, monkeypatch):
    rope = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32,
        "beta_fast": 4.0, "beta_slow": 1.0,
    }  # fmt: skip
    make_tiny_model(rope_parameters=rope, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: name)
    return tmp_path


def change(place, file="config.json", **values):
    path = place / "model" / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def test_a_checkpoint_is_written_with_what_reads_it(place, capsys):
    cli.main(["export", "gguf", str(place / "model"), str(place / "m.gguf"), "--llama-cpp", str(place / "llama.cpp")])
    assert f"llama-server -m {place / 'm.gguf'} -c 256 --yarn-beta-fast 4 --yarn-beta-slow 1" in capsys.readouterr().out
    assert gguf.GGUFReader(place / "m.gguf").get_field("llama.rope.scaling.factor").contents() == 8.0
    with pytest.raises(ValueError, match="is there already"):
        export_gguf(place / "model", place / "m.gguf", place / "llama.cpp")


@pytest.mark.parametrize(
    ("rope", "declared", "window"),
    [
        ({"factor": 16.0}, 256, 512),  # a factor that is larger than the window needs
        ({"rope_type": "linear", "factor": 8.0, "original_max_position_embeddings": None, "beta_fast": None}, 32, 256),
    ],
)
def test_a_file_declares_what_the_config_does_and_the_command_the_whole_window(place, rope, declared, window):
    """The converter copies max_position_embeddings, so such files were taken for wrong ones."""
    path = place / "model" / "config.json"
    config = json.loads(path.read_text())
    entry = {key: value for key, value in (config["rope_parameters"] | rope).items() if value is not None}
    original = {"original_max_position_embeddings": 32} if entry["rope_type"] == "linear" else {}
    change(place, rope_parameters=entry, max_position_embeddings=declared, **original)
    made = export_gguf(place / "model", place / "m.gguf", place / "llama.cpp")
    assert gguf.GGUFReader(place / "m.gguf").get_field("llama.context_length").contents() == declared
    assert made.window == window


def test_the_miniature_is_found_by_its_name(place):
    made = api_export("miniature", place / "m.gguf", place / "llama.cpp")
    assert made.window == 512


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wrong_factor": 4.0}, r"rope.scaling.factor is 4.0, not 8.0.*newer llama.cpp"),
        ({"fails": True}, "converter failed: NotImplementedError: BPE pre-tokenizer was not recognized"),
        (
            {"too_many_tokens": True},
            r'converter failed: AssertionError at assert not config.get\("too_many_tokens"\)\.$',
        ),
        ({"auto_map": {"AutoConfig": "x.Y"}}, "names code of its own"),
    ],
)
def test_what_is_wrong_leaves_no_file(place, values, message):
    change(place, **values)
    with pytest.raises(ValueError, match=message):
        export_gguf(place / "model", place / "m.gguf", place / "llama.cpp")
    assert sorted(path.name for path in place.iterdir()) == ["llama.cpp", "model"]


def test_without_the_converter_it_says_how_to_get_it(place):
    with pytest.raises(ValueError, match=r"pip download .*llama-cpp-python.*--llama-cpp llama_cpp_python"):
        export_gguf(place / "model", place / "m.gguf")
    shutil.rmtree(place / "llama.cpp")
    with pytest.raises(ValueError, match=r"holds no convert_hf_to_gguf.py"):
        export_gguf(place / "model", place / "m.gguf", place / "llama.cpp")


def test_a_tokenizers_own_code_is_not_run(place):
    """The converter opens tokenizers with trust_remote_code."""
    change(place, "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})
    with pytest.raises(ValueError, match=r"tokenizer_config.json names code of its own"):
        export_gguf(place / "model", place / "m.gguf", place / "llama.cpp")


YARN = {"method": "yarn", "head_dim": 64, "theta": 1e4, "factor": 4.0, "original_window": 8192}


@pytest.mark.parametrize(
    ("scaling", "options"),
    [
        (YARN, ("--yarn-beta-fast", "4", "--yarn-beta-slow", "1")),
        (YARN | {"beta": 32.0}, ()),
        ({"method": "linear", "head_dim": 64, "theta": 1e4, "factor": 4.0}, ()),
        ({"method": "llama3", "head_dim": 64, "theta": 1e4, "factor": 4.0, "original_window": 8192}, ()),
    ],
)
def test_options_are_what_the_file_cannot_say(scaling, options):
    assert reading_options(RopeScaling(**scaling)) == options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_factor": 1.0}, "own temperature .1.1386."),
        ({"truncate": False}, "whole pairs"),
        ({"method": "dynamic"}, "no dynamic RoPE"),
    ],
)
def test_a_rope_that_llama_cpp_cannot_apply_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        reading_options(RopeScaling(**(YARN | changes)))


def test_special_tokens_are_those_that_the_file_names(tmp_path, tiny_tokenizer):
    """transformers 5.17 reads SmolLM2's file with BOS as EOS and without padding: documents would end with a BOS."""
    eos, end = (tiny_tokenizer.convert_tokens_to_ids(token) for token in (tiny_tokenizer.eos_token, "<|end|>"))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_bos_token_id(tiny_tokenizer.bos_token_id)
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(end)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read = copy.deepcopy(tiny_tokenizer)
    read.eos_token = read.bos_token
    name_special_tokens(read, tmp_path / "model.gguf")
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (tiny_tokenizer.bos_token_id, eos, end)
    assert read.unk_token is tiny_tokenizer.unk_token
    assert len(read) == len(tiny_tokenizer)
