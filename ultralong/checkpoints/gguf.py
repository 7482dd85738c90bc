"""A checkpoint as a GGUF file, by llama.cpp's own converter, and what llama.cpp has to be told to read its RoPE right.

The converter is no package of its own: it is a script in llama.cpp's repository, and knows every architecture that
llama.cpp reads. It is run from there in a process of its own. What it wrote is read back and compared with the config.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ultralong.checkpoints.config import load_config
from ultralong.rope.config import declared_window, from_config, reader
from ultralong.rope.frequencies import attention_factor
from ultralong.rope.scaling import RopeScaling
from ultralong.utils.extras import require
from ultralong.utils.files import atomic_path, read_json_object

SCRIPT = "convert_hf_to_gguf.py"
LLAMA_CPP = "llama_cpp_python-0.3.36/vendor/llama.cpp"
GET = (
    "pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && "
    "tar xzf llama_cpp_python-0.3.36.tar.gz, or clone llama.cpp; and pip install gguf sentencepiece"
)
# llama.cpp takes these for every model whose file does not say otherwise, and reads them from few architectures' files.
BETA_FAST, BETA_SLOW = 32.0, 1.0
CLOSE = 1e-4  # relative difference of numbers that are float32 in the file


@dataclass(frozen=True)
class GgufExport:
    """A GGUF file and how to read it.

    Attributes:
        file: The file.
        architecture: Its name in llama.cpp.
        window: Tokens that the model can read; a linear scaling and a larger factor reach beyond those that the file
            declares.
        options: What llama.cpp's programs (llama-cli, llama-server) need on their command line besides the file, as the
            file cannot say it.
    """

    file: str
    architecture: str
    window: int
    options: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return asdict(self)


def export_gguf(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    llama_cpp: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
) -> GgufExport:
    """Convert a checkpoint folder to one GGUF file.

    Args:
        checkpoint: A Hugging Face folder with safetensors weights.
        out: The file to write.
        llama_cpp: A folder with llama.cpp's sources, which hold the converter.
        dtype: "auto" (as in the checkpoint), "f32", "f16", "bf16" or "q8_0".

    Returns:
        The file, and the options that llama.cpp needs to read it.

    Raises:
        ValueError: llama.cpp cannot apply the checkpoint's RoPE, the converter is not there or failed, the file exists,
            or it does not say what the config says.
        ImportError: gguf is not installed.
    """
    folder, file = Path(checkpoint), Path(out)
    config = load_config(folder)
    scaling = from_config(config)
    options = reading_options(scaling)
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in read_json_object(folder / name):
            raise ValueError(f"{folder / name} names code of its own (auto_map), which the converter would run.")
    if file.exists():
        raise ValueError(f"{file} is there already. Remove it, or choose another file.")
    script = _script(llama_cpp)
    gguf = require("gguf", "gguf")
    if importlib.util.find_spec("sentencepiece") is None:
        raise ValueError("The converter needs sentencepiece, which is not installed: pip install sentencepiece")
    with atomic_path(file) as temporary:
        _convert([sys.executable, str(script), str(folder), "--outfile", str(temporary), "--outtype", dtype])
        # The file copies this entry; a factor may reach further than the window needs.
        declared = int(reader(config)("max_position_embeddings"))
        architecture = _compare(gguf.GGUFReader(temporary), scaling, declared)
    return GgufExport(str(file), architecture, declared_window(config), options)


def reading_options(scaling: RopeScaling) -> tuple[str, ...]:
    """What llama.cpp has to be told of a RoPE scaling, besides what a GGUF file says.

    Raises:
        ValueError: It has no such scaling.
    """
    if scaling.method in ("dynamic", "longrope"):
        raise ValueError(f"llama.cpp has no {scaling.method} RoPE for every architecture; extend the model with yarn.")
    if scaling.method != "yarn":
        return ()
    if scaling.ramp != "dimension" or not scaling.truncate:
        raise ValueError("llama.cpp blends YaRN over whole pairs by dimension, and this checkpoint does otherwise.")
    own = attention_factor(RopeScaling(**{**asdict(scaling), "attention_factor": None}))
    if abs(attention_factor(scaling) - own) > CLOSE:
        raise ValueError(
            f"llama.cpp applies YaRN's own temperature ({own:.4f}) whatever a file says, and this checkpoint has "
            f"attention_factor {scaling.attention_factor:g}."
        )
    if (scaling.beta, scaling.alpha) == (BETA_FAST, BETA_SLOW):
        return ()
    return ("--yarn-beta-fast", f"{scaling.beta:g}", "--yarn-beta-slow", f"{scaling.alpha:g}")


def _script(llama_cpp: str | os.PathLike[str] | None) -> Path:
    if llama_cpp is None:
        raise ValueError(
            f"A GGUF file is written by llama.cpp's converter, which is no package. Get it once ({GET}), then give its "
            f"folder: --llama-cpp {LLAMA_CPP}"
        )
    script = Path(llama_cpp) / SCRIPT
    if not script.is_file():
        raise ValueError(f"{llama_cpp} holds no {SCRIPT}: give the folder of llama.cpp's sources. To get it: {GET}.")
    return script.absolute()


def _convert(words: list[str]) -> None:
    """Run the converter. It reads files only: nothing is looked up on the hub."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        last = said[-1].strip() if said else f"code {done.returncode}"
        if ":" not in last and len(said) > 1:  # an error without words, as of an assert: its line says more
            line = next((text.strip() for text in reversed(said[:-1]) if text.strip(" ^~")), "")
            last = f"{last} at {line}"
        text = f"llama.cpp's converter failed: {last}."
        if "pre-tokenizer was not recognized" in text:
            text += " It knows the tokenizers of published models, and takes none that it does not know."
        raise ValueError(text)


def _compare(file: Any, scaling: RopeScaling, window: int) -> str:
    """Compare what a file says of window and RoPE with the config; returns its architecture."""

    def read(key: str) -> Any:
        field = file.get_field(key)
        return None if field is None else field.contents()

    name = read("general.architecture")
    expected: dict[str, Any] = {"context_length": window, "rope.freq_base": scaling.theta}
    if scaling.method in ("linear", "yarn"):
        expected |= {"rope.scaling.type": scaling.method, "rope.scaling.factor": scaling.factor}
    if scaling.method == "yarn":
        expected["rope.scaling.original_context_length"] = scaling.original_window
    wrong = [
        f"{key} is {found}, not {value}"
        for key, value in expected.items()
        if not _same(found := read(f"{name}.{key}"), value)
    ]
    if scaling.method == "llama3" and not any(tensor.name == "rope_freqs.weight" for tensor in file.tensors):
        wrong.append("the factors of llama3 (rope_freqs.weight) are missing")
    if wrong:
        raise ValueError(f"The converter's file differs from the config: {'; '.join(wrong)}. Take a newer llama.cpp.")
    return str(name)


def _same(found: Any, value: Any) -> bool:
    if isinstance(value, str) or found is None:
        return bool(found == value)
    return abs(float(found) - float(value)) <= CLOSE * abs(float(value))
