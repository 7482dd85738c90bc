"""The processes of a peer: `python -m ultralong.bench.training.peers.work NAME MODEL FOLDER LENGTHS`."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ultralong.utils.files import write_json

Steps = Callable[[Tensor], float]


def work(name: str, model_folder: str, place: Path, lengths: Sequence[int]) -> None:
    """Train a step on each row; after each, write the seconds and losses so far and the peaks of memory in bytes.

    Args:
        name: The peer.
        model_folder: Folder of the model's config and tokenizer.
        place: Folder of `rank-N.json`, and of what the peer writes itself.
        lengths: Tokens of each row; the peer is set up for the last one's.
    """
    cuda, rank = torch.cuda.is_available(), os.environ["RANK"]
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    generator = torch.Generator().manual_seed(0)
    rows, tokens = [torch.randint(0, 256, (1, length), generator=generator) for length in lengths], lengths[-1]
    times: list[float] = []
    losses: list[float] = []

    def done(seconds: float, loss: float) -> None:
        times.append(seconds)
        losses.append(loss)
        peaks = {"peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if cuda:
            peaks["peak_gpu_gib"] = torch.cuda.max_memory_allocated()
        write_json(place / f"rank-{rank}.json", {"times": times, "losses": losses, "peaks": peaks})

    with _attention(name) if cuda else nullcontext():
        if name == "trl-sft-cp":
            from ultralong.bench.training.peers.trl_sft import sft_train

            sft_train(model_folder, tokens, rows, str(place / "run"), done)
        else:
            step = _step(name, model_folder, tokens, rows, str(place / "run"))
            for row in rows:
                ids = row.to("cuda" if cuda else "cpu")
                begin = time.perf_counter()
                loss = step(ids)  # a number read back: the device is done with the passes
                if cuda:
                    torch.cuda.synchronize()
                done(time.perf_counter() - begin, loss)
    if torch.distributed.is_initialized():  # a rank that leaves first may end the other's connection with an error
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _attention(name: str) -> AbstractContextManager[None]:
    """Attention by one of torch's kernels; torchtitan chooses its own."""
    if name == "torchtitan-cp":
        return nullcontext()
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION if name.endswith("flash") else SDPBackend.CUDNN_ATTENTION)


def _step(name: str, model_folder: str, tokens: int, rows: list[Tensor], out: str) -> Steps:
    """A peer's training step. Imported here: packages that it alone needs come with it."""
    if name.startswith("deepspeed"):
        from ultralong.bench.training.peers.alst import alst_step

        return alst_step(model_folder, tokens, "offload" in name, name.endswith("offload-all"))
    if name == "torchtitan-cp":
        from ultralong.bench.training.peers.titan import titan_step

        return titan_step(model_folder, tokens, rows, out)
    from ultralong.bench.training.peers.accelerate_cp import accelerate_step

    return accelerate_step(model_folder)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], Path(sys.argv[3]), [int(word) for word in sys.argv[4].split(",")])
