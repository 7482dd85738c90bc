"""`ultralong check`: what each program will read from a checkpoint's folder, before anything is loaded."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import __version__ as transformers_version

from ultralong.checkpoints.class_table import class_table
from ultralong.checkpoints.config import CONFIG_ERRORS, check_companions, load_config, one_line, weights_dtype
from ultralong.checkpoints.files import check_no_adapter, companion_files, locate
from ultralong.checkpoints.readers import RULES, Rule, Table, knows, same_table, table_of
from ultralong.rope import RopeScaling, from_config, rope_parameters, window_of
from ultralong.rope.config import other_ropes
from ultralong.utils.files import read_json_object

TOKENIZER, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


@dataclass(frozen=True)
class Reading:
    """What one program in one version reads.

    Attributes:
        program: Its name.
        version: Its version.
        verdict: "right" (the table that is meant, at every length), "wrong" (another one, unless what is typed says it)
            or "refused" (it does not open).
        window: Tokens that it offers by itself; None where it does not open.
        dtype: Type of the parameters as it opens them by default.
        tokenizer: Class of the tokenizer, as it is named in the folder.
        remarks: What it ignores or gets wrong, each as a sentence with what to do.
        typed: What to type.
    """

    program: str
    version: str
    verdict: str
    window: int | None
    dtype: str
    tokenizer: str
    remarks: tuple[str, ...]
    typed: str


@dataclass(frozen=True)
class Readings:
    """What the programs read from one folder.

    Attributes:
        model: The folder.
        model_type: transformers' name of the architecture.
        rope: The RoPE that is meant, as transformers 5 writes it.
        window: Tokens that are meant.
        readings: One for each program and version.
    """

    model: str
    model_type: str
    rope: dict[str, Any]
    window: int
    readings: tuple[Reading, ...]

    def __str__(self) -> str:
        """A table, and below it what is to be known of each program."""
        rope = ", ".join(f"{key} {value}" for key, value in self.rope.items() if not isinstance(value, list))
        lines = [f"{self.model}: {self.model_type}, window {self.window:,}, {rope}", ""]
        lines.append(f"{'program':22}{'RoPE':10}{'window':>11}  {'type':10}tokenizer")
        for one in self.readings:
            window = "" if one.window is None else f"{one.window:,}"
            row = f"{one.program + ' ' + one.version:22}{one.verdict:10}{window:>11}  {one.dtype:10}{one.tokenizer}"
            lines.append(row.rstrip())
        for one in self.readings:
            lines += ["", f"{one.program} {one.version}: {one.typed}", *(f"  {text}" for text in one.remarks)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, numbers and strings, ready for JSON."""
        return asdict(self)


def check(model: str | os.PathLike[str], revision: str | None = None) -> Readings:
    """What transformers 4 and 5, vLLM, SGLang and llama.cpp read from a checkpoint, and what they get wrong.

    Args:
        model: Checkpoint folder, or a hub id.
        revision: Branch, tag or commit of a hub model.

    Raises:
        ValueError: There is no such checkpoint, it lies beside an adapter, its RoPE is none that this library
            reproduces, or a file of its tokenizer is damaged.
    """
    folder = locate(model, revision)
    check_no_adapter(folder)
    entries = read_json_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    config = load_config(folder)
    check_companions(folder, companion_files(folder)[0])
    meant, window = from_config(config), window_of(config)
    entries.setdefault("max_position_embeddings", config.max_position_embeddings)
    seen = _Folder(folder, entries, meant, window)
    readings = (*(seen.by_rule(rule) for rule in RULES if rule.program == "transformers"), seen.by_transformers_5())
    others = tuple(seen.by_rule(rule) for rule in RULES if rule.program != "transformers")
    return Readings(str(folder), str(config.model_type), rope_parameters(meant), window, readings + others)


@dataclass(frozen=True)
class _Folder:
    folder: Path
    entries: dict[str, Any]
    meant: RopeScaling
    window: int

    def by_rule(self, rule: Rule) -> Reading:
        """What a program reads by its rule."""
        old = rule.program == "transformers"
        kind = str(self.entries.get("model_type"))
        if old and not knows(rule.version, kind):
            return self._refused(rule.program, rule.version, f"it does not know the model type {kind!r}.", rule.typed)
        tokenizer, problems, opens = self._tokenizer(rule.version if old else None, rule.program)
        if not opens:
            return self._refused(rule.program, rule.version, problems[0], rule.typed)
        try:
            table, found = rule.read(self.entries, self.window, self.meant)
        except ValueError as error:
            return self._refused(rule.program, rule.version, one_line(error), rule.typed)
        remarks = [f"{_capital(what)}. {advice}" for what, advice in found] + problems
        if not old and other_ropes(self.entries):
            remarks.append("That it scales the full-attention layers alone was not tried: try it past the old window.")
        offered = rule.window(self.entries, self.window, self.meant)
        if old and offered != self.window:
            remarks.append(self._stays(offered))
        elif rule.raised and offered < self.window and self.meant.method != "longrope":
            remarks.append(
                f"It takes {offered:,} tokens for the whole window, which max_position_embeddings says, and starts "
                "with no more unless that is overridden: write the window there."
            )
        elif offered != self.window and not any("window" in text for text in remarks):
            remarks.append(f"It offers {offered:,} tokens by itself.")
        dtype, problem = self._dtype(old)
        remarks += [problem] if problem else []
        short = offered < self.window and self.meant.method != "longrope"
        typed = self._typed(rule.typed + rule.raised if short else rule.typed)
        typed += "".join(f" {advice[5:-1]}" for _, advice in found if advice.startswith("Pass --yarn"))
        verdict = "right" if self._right(table) else "wrong"
        if verdict == "wrong" and not found:
            remarks.insert(0, "rope_theta and rope_scaling in config.json say another thing than its rope_parameters.")
        return Reading(rule.program, rule.version, verdict, offered, dtype, tokenizer, tuple(remarks), typed)

    def by_transformers_5(self) -> Reading:
        """What the installed transformers reads: the model class itself is asked."""
        typed = self._typed("AutoModelForCausalLM.from_pretrained(FOLDER)")
        try:
            found = class_table(load_config(self.folder))
        except CONFIG_ERRORS as error:
            return self._refused("transformers", transformers_version, one_line(error), typed)
        tokenizer, problems, _ = self._tokenizer(None, "transformers")
        dtype, problem = self._dtype(False)
        first = table_of(self.meant)(0)
        right = found is not None and same_table(lambda length: first, lambda length: found, (0,))
        remarks = [*problems, *([problem] if problem else [])]
        if not right:
            remarks.insert(
                0, f"The class of {self.entries.get('model_type')} computes another table than its config says."
            )
        window = int(self.entries["max_position_embeddings"])
        if window != self.window:
            remarks.append(self._stays(window))
        verdict = "right" if right else "wrong"
        return Reading("transformers", transformers_version, verdict, window, dtype, tokenizer, tuple(remarks), typed)

    def _stays(self, window: int) -> str:
        return f"max_position_embeddings is {window:,}, which the {self.meant.method} type scales: no fault."

    def _right(self, table: Table) -> bool:
        short = min(self.meant.original_window or self.window, self.window)
        return same_table(table, table_of(self.meant), (short, self.window))

    def _refused(self, program: str, version: str, why: str, typed: str) -> Reading:
        return Reading(program, version, "refused", None, "", "", (_capital(why),), self._typed(typed))

    def _typed(self, form: str) -> str:
        """What to type, with the folder as Python or a shell takes it."""
        text = str(self.folder)
        folder = json.dumps(text, ensure_ascii=False) if "from_pretrained" in form else shlex.quote(text)
        return form.replace("WINDOW", str(self.window)).replace("FOLDER", folder)

    def _tokenizer(self, version: str | None, program: str) -> tuple[str, list[str], bool]:
        """Class of the tokenizer, remarks, and whether a version of transformers 4 opens it (None is version 5)."""
        file = self.folder / TOKENIZER
        if not file.is_file():
            return "", [f"The folder has no {TOKENIZER}."], True
        settings = read_json_object(file)
        name = str(settings.get("tokenizer_class") or "")
        if version is not None:
            advice = "Write the folder again with ultralong extend, or take transformers 5."
            if name == "TokenizersBackend":
                return name, [f"it has no tokenizer class TokenizersBackend. {advice}"], False
            if isinstance(settings.get("extra_special_tokens"), list):
                return name, [f"it cannot read extra_special_tokens as a list. {advice}"], False
        remarks = self._template(settings.get("chat_template"), version, program)
        limit = settings.get("model_max_length")
        if program == "transformers" and isinstance(limit, int) and limit < self.window:
            remarks.append(f"The tokenizer's model_max_length is {limit:,}: it warns beyond, and truncates there.")
        return name, remarks, True

    def _template(self, entry: Any, version: str | None, program: str) -> list[str]:
        """Which chat template a program takes, where the folder has two, or one that it does not look for.

        transformers 4.46 looks into tokenizer_config.json alone; later releases, and servers that open the tokenizer
        with them, take chat_template.jinja before it; llama.cpp's converter takes it after it.
        """
        file = self.folder / TEMPLATE
        if not file.is_file():
            return []
        if entry is None:
            none = "It looks for no chat_template.jinja, so the tokenizer has no chat template."
            return [none] if version == "4.46" else []
        named = entry if isinstance(entry, list) else [{"name": "default", "template": entry}]
        found = [one.get("template") for one in named if isinstance(one, dict) and one.get("name") == "default"]
        if found == [file.read_text(encoding="utf-8")]:
            return []
        taken, other = TEMPLATE, f"chat_template in {TOKENIZER}"
        if version == "4.46" or program == "llama.cpp":
            taken, other = other, taken
        return [f"It takes {taken}, and other programs {other}, which differs: make them one, or remove one."]

    def _dtype(self, old: bool) -> tuple[str, str | None]:
        """The type that a program opens the weights in when it is told to take the config's, and a remark."""
        try:
            stored = weights_dtype(self.folder)
        except ValueError:
            stored = None
        name = self.entries.get("torch_dtype") if old else self.entries.get("dtype") or self.entries.get("torch_dtype")
        held = str(stored).removeprefix("torch.") if stored is not None else ""
        if name and held and name != held and "quantization_config" not in self.entries:
            return str(name), f"The config says {name} and the weights are {held}: it computes in {name}."
        return str(name or held), None


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
