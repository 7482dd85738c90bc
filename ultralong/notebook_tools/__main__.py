"""`python -m ultralong.notebook_tools run [NAMES] [--check]`, `sync NAMES` or `record NAME --set DEVICE=cuda`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ultralong.notebook_tools.record import changes_of, record
from ultralong.notebook_tools.rules import violations
from ultralong.notebook_tools.run import chosen_parameters, execute, write_notebook
from ultralong.notebook_tools.settings import Settings, load_settings, sources
from ultralong.notebook_tools.sync import sync
from ultralong.utils.extras import require


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 1 when a notebook failed or broke a rule."""
    parser = argparse.ArgumentParser(prog="python -m ultralong.notebook_tools", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute percent sources and write the notebooks beside them")
    run.add_argument("names", nargs="*", metavar="NAME", help="such as 02_yarn or 02; all when none is named")
    run.add_argument("--check", action="store_true", help="execute and check, write nothing")
    words = commands.add_parser("sync", help="take over new words and comments; outputs stay, nothing is executed")
    words.add_argument("names", nargs="+", metavar="NAME", help="such as 02_yarn or 02")
    other = commands.add_parser("record", help="execute with other parameters, as on a GPU, and keep what was found")
    other.add_argument("names", nargs="+", metavar="NAME", help="such as 05_attention_kernels or 05")
    other.add_argument("--set", action="append", default=[], dest="changes", metavar="NAME=VALUE", help="a parameter")
    other.add_argument("--out", type=Path, default=Path("build/recorded"), help="for NAME.ipynb, NAME.json and NAME/")
    for each in (run, words, other):
        each.add_argument("--folder", type=Path, default=Path("notebooks"), help="where the sources are")
    options = parser.parse_args(arguments)
    try:
        settings = load_settings(options.folder)
        paths = sources(options.folder, options.names)
        if options.command == "sync":
            written = [_sync(path, settings[path.stem]) for path in paths]
            return int(not all(written))
        if options.command == "record":
            changes = [changes_of(options.changes, path) for path in paths]
            rows = [
                record(path, settings[path.stem], each, options.out) for path, each in zip(paths, changes, strict=True)
            ]
            for row in rows:
                print(f"{row['notebook']}: {row['seconds']:.0f} s, {row['error'] or 'nothing failed'}")
            return int(any(row["error"] for row in rows))
        failed = [path.stem for path in paths if not _one(path, settings.get(path.stem), options.check)]
    except (ValueError, ImportError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if failed:
        print(f"{len(failed)} of {len(paths)} notebooks failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _one(path: Path, settings: Settings | None, check: bool) -> bool:
    """Execute one source, report it in one line, and write it unless `check`; True when nothing was wrong."""
    if settings is None:
        raise ValueError(f"{path.stem} is not in {path.parent / 'ci.yml'}: add it there with a timeout.")
    parameters = chosen_parameters(path, settings)
    failure = require("papermill", extra="notebooks").PapermillExecutionError
    started = time.perf_counter()
    try:
        notebook = execute(path, parameters, settings.timeout, quiet=not sys.stderr.isatty())
    except (failure, TimeoutError) as error:
        print(f"{path.stem}: failed\n{error}", file=sys.stderr)
        return False
    seconds = time.perf_counter() - started
    wrong = violations(notebook, path, settings)
    for text in wrong:
        print(f"{path.stem}: {text}", file=sys.stderr)
    if not check and not wrong:
        write_notebook(notebook, path.with_suffix(".ipynb"))
    print(f"{path.stem}: {seconds:.0f} s, {'checked' if check else 'written' if not wrong else 'not written'}")
    return not wrong


def _sync(path: Path, settings: Settings) -> bool:
    """Write one notebook with its source's new words, unless it breaks a rule; True when nothing was wrong."""
    notebook = sync(path)
    wrong = violations(notebook, path, settings)
    for text in wrong:
        print(f"{path.stem}: {text}", file=sys.stderr)
    if not wrong:
        write_notebook(notebook, path.with_suffix(".ipynb"))
    print(f"{path.stem}: {'not written' if wrong else 'words taken over, nothing executed'}")
    return not wrong


if __name__ == "__main__":
    sys.exit(main())
