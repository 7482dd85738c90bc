"""`python -m ultralong.launch CONFIG --nodes N --gpus-per-node G`: what a rendered script does with `--dry-run`."""

from __future__ import annotations

import argparse
import gc
import sys

from ultralong.training.config import TrainConfig
from ultralong.utils import settings
from ultralong.utils.processes import without_collections


def main(arguments: list[str] | None = None) -> int:
    """Print one line a check; the exit code is 0 when all are good, 1 when not, 2 when the config cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m ultralong.launch", description="Check a run without a GPU.")
    parser.add_argument("config", help="the config.yaml that the scripts read")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, required=True)
    options = parser.parse_args(arguments)
    try:
        config = settings.load(TrainConfig, options.config)
    except ValueError as error:
        print(f"WRONG config: {error}", file=sys.stderr)
        return 2
    with without_collections():
        from ultralong.launch.dry_run import check
    findings = check(config, options.nodes, options.gpus_per_node)
    for finding in findings:
        print(finding)
    return int(not all(finding.good for finding in findings))


if __name__ == "__main__":
    code = main()
    gc.freeze()  # as a command does before it ends
    sys.exit(code)
