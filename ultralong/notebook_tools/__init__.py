"""Notebooks made from percent sources: executed, cleaned, checked and written by one command, never saved by hand.

`notebooks/NN_name.py` is what people write and review; `notebooks/NN_name.ipynb`, with its outputs, is what people
read. `python -m ultralong.notebook_tools run` makes the second from the first, with the parameters and limits in
`notebooks/ci.yml`; `--check` executes and checks without writing. Where words and comments changed only, `sync` takes
them over and executes nothing.
"""

from ultralong.notebook_tools.output import output_folder
from ultralong.notebook_tools.values import store, stored

__all__ = ["output_folder", "store", "stored"]
