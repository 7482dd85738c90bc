"""Execute a percent source: inject parameters, keep outputs, remove what belongs to one run or one machine.

What is taken out is what would differ between two runs of the same source or could break a page that renders it:
papermill's and the kernel's timestamps, the injected parameters cell, widget state, progress bars, absolute paths.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultralong.notebook_tools.output import PREFIX
from ultralong.notebook_tools.settings import Settings
from ultralong.utils.extras import require
from ultralong.utils.files import write_text

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
# papermill stops without kernelspec.language, and nbconvert writes .txt without language_info; no version, as the
# executed file has to come out the same on each Python that is supported.
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS_BAR = re.compile(r"\d+%\|.*\||\d+(it|ex)?\s?\[\d\d:\d\d")
TEMPORARY = re.compile(rf"\S*/{PREFIX}\w+")  # another name in each run
# One thread, so that a small notebook is as fast on a busy machine; the hash seed, so that sets print alike.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


def read_source(path: str | os.PathLike[str]) -> Any:
    """Read a percent source as a notebook without outputs, with a full header and ids that follow from the text."""
    jupytext = require("jupytext", extra="notebooks")
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata.clear()
    notebook.metadata.update(kernelspec=dict(KERNEL), language_info=dict(LANGUAGE))
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        # jupytext draws ids at random, which would change every cell of the file at every run.
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:12]
        cell.id = f"{digest}-{seen[digest]}"
        seen[digest] += 1
        cell.metadata = type(cell.metadata)({"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def parameter_names(path: str | os.PathLike[str]) -> list[str]:
    """Names that the source's parameters cell defines, as papermill sees them."""
    with tempfile.TemporaryDirectory() as folder:
        plain = _write(read_source(path), Path(folder) / "source.ipynb")
        return list(require("papermill", extra="notebooks").inspect_notebook(str(plain)))


def chosen_parameters(path: str | os.PathLike[str], settings: Settings) -> dict[str, Any]:
    """The parameters to inject into a notebook: the shared ones that it defines, and its own.

    papermill takes a name that the notebook does not have without complaint, so a typing error would test nothing.

    Raises:
        ValueError: The notebook's own entry names a parameter that its parameters cell does not define.
    """
    defined = parameter_names(path)
    unknown = sorted(set(settings.parameters) - set(defined))
    if unknown:
        raise ValueError(f"{Path(path).name} has no parameters {unknown}; its parameters cell defines {defined}.")
    return {name: value for name, value in settings.shared.items() if name in defined} | dict(settings.parameters)


def execute(
    path: str | os.PathLike[str],
    parameters: Mapping[str, Any],
    timeout: int,
    quiet: bool = True,
    keep: Path | None = None,
) -> Any:
    """Execute a percent source under papermill, in its own folder, and return the notebook cleaned.

    Args:
        path: The percent source.
        parameters: What to inject after its parameters cell.
        timeout: Seconds that one cell may take.
        quiet: False draws papermill's bar, one step a cell.
        keep: Where papermill's own file is kept, also when a cell fails: up to that cell it has its outputs.

    Raises:
        papermill.PapermillExecutionError: A cell failed; the message holds its traceback.
        TimeoutError: A cell took longer than `timeout`.
    """
    papermill = require("papermill", extra="notebooks")
    nbformat = require("nbformat", extra="notebooks")
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        plain, executed = _write(read_source(path), Path(folder) / "in.ipynb"), keep or Path(folder) / "out.ipynb"
        os.environ.update(ENVIRONMENT)
        try:
            papermill.execute_notebook(
                str(plain),
                str(executed),
                parameters=dict(parameters),
                kernel_name="python3",
                cwd=str(Path(path).parent),
                execution_timeout=timeout,
                progress_bar=not quiet,
                log_output=False,
            )
        finally:
            os.environ.clear()
            os.environ.update(before)
        return clean(nbformat.read(executed, as_version=4), read_source(path), Path(path).resolve().parents[1])


def clean(executed: Any, source: Any, root: Path) -> Any:
    """Put the outputs of an executed notebook onto its source, without what belongs to this run or this machine.

    Args:
        executed: What papermill wrote: the cells of `source` and one injected cell.
        source: What `read_source` gave; its cells, ids and header are kept.
        root: The clone; paths inside it are written relative to it.

    Returns:
        A new notebook, ready to be written.
    """
    kept = [cell for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    assert [cell.source for cell in kept] == [cell.source for cell in source.cells], "papermill changed the cells"
    count = 0
    for cell, ran in zip(source.cells, kept, strict=True):
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = _joined([_relative(output, root) for output in ran.outputs if not _fleeting(output)])
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    return source


def _joined(outputs: list[Any]) -> list[Any]:
    """Printed text in one piece: into how many it comes depends on how busy the machine was."""
    found: list[Any] = []
    for output in outputs:
        last = found[-1] if found else None
        if last is not None and last.output_type == output.output_type == "stream" and last.name == output.name:
            last.text += output.text
        else:
            found.append(output)
    return found


def _fleeting(output: Any) -> bool:
    """Whether an output lives only as long as its kernel: a widget, or a progress bar on standard error."""
    if WIDGET in output.get("data", {}):
        return True
    if output.output_type != "stream" or output.name != "stderr":
        return False
    lines = [line for line in re.split(r"[\r\n]", output.text) if line.strip()]
    return all(PROGRESS_BAR.search(line) for line in lines)


def _relative(output: Any, root: Path) -> Any:
    def shorten(text: str) -> str:
        text = TEMPORARY.sub("a temporary folder", text)
        return text.replace(f"{root}{os.sep}", "").replace(str(root), ".")

    if output.output_type == "stream":
        output.text = shorten(output.text)
    for kind, content in output.get("data", {}).items():
        if kind.startswith("text/") and isinstance(content, str):
            output.data[kind] = shorten(content)
    return output


def _write(notebook: Any, path: Path) -> Path:
    nbformat = require("nbformat", extra="notebooks")
    nbformat.validate(notebook)
    write_text(path, nbformat.writes(notebook) + "\n")
    return path


def write_notebook(notebook: Any, path: str | os.PathLike[str]) -> None:
    """Validate a notebook and write it atomically.

    Raises:
        nbformat.ValidationError: It does not follow nbformat 4.5.
    """
    _write(notebook, Path(path))
