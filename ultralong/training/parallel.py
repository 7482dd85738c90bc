"""Processes of a run: context-parallel groups, FSDP2 sharding, sums. Launching and devices are accelerate's."""

from __future__ import annotations

import contextlib
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ultralong.attention.collectives import waiting
from ultralong.training.adapters.four_bits import hold_in_four_bits, is_quantised
from ultralong.training.config import TrainConfig
from ultralong.training.process_checks import process_problem
from ultralong.training.watch.trackers import make_trackers
from ultralong.utils.local_ranks import nccl_options

T = TypeVar("T")
SPARE = timedelta(minutes=1)  # that collectives wait longer than a hang takes to be found, so that its record is whole


@dataclass(frozen=True)
class Processes:
    """This process and its place among the others.

    Processes `k * C .. (k + 1) * C - 1` share rows, with C the context-parallel size; `k` is the data-parallel rank.

    Attributes:
        accelerator: accelerate's handle: device, launch, trackers, wrapping.
        context_parallel_size: Processes that share a row.
        context_parallel_group: The process group of those, None when alone.
        mesh: Replicas x FSDP shards, None when every process has all parameters.
    """

    accelerator: Accelerator
    context_parallel_size: int
    context_parallel_group: dist.ProcessGroup | None
    mesh: DeviceMesh | None = None

    @property
    def data_rank(self) -> int:
        """Data-parallel rank: the number of this process's context-parallel group."""
        return self.accelerator.process_index // self.context_parallel_size

    @property
    def data_ranks(self) -> int:
        """Data-parallel size: groups that work on different rows."""
        return self.accelerator.num_processes // self.context_parallel_size

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and bars."""
        return self.accelerator.is_main_process

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all processes."""
        if self.accelerator.num_processes > 1:
            with waiting("sum over all processes"):
                dist.all_reduce(values)
        return values

    def largest(self, *values: float) -> list[float]:
        """The largest of each number over all processes."""
        if self.accelerator.num_processes == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        with waiting("largest over all processes"):
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return [float(value) for value in found]

    @contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Iterator[None]:
        """A forward and backward pass; replicas exchange gradients in the last one of a step only.

        Shards are summed in each: FSDP2 would hold all gradients in full, in float32 and on every process, until then.
        DistributedDataParallel decides in the forward pass whether the backward pass will exchange gradients.
        """
        if isinstance(model, FSDPModule):
            model.set_requires_all_reduce(last)
            yield
            return
        with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
            yield

    def barrier(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()


def shard_parameters(loss: nn.Module, layers: list[nn.Module], processes: Processes, config: TrainConfig) -> None:
    """Shard a model's parameters over the processes of the mesh (FSDP2), layer by layer, in float32.

    Each layer's parameters are gathered in the run's type when its turn comes, so activations have that type as well;
    gradients are summed in float32. Frozen parameters are held in the run's type, where no update would be lost, or in
    4 bits (`lora.base`).
    torch's own FSDP2 is used: accelerate's refuses to run on CPUs, where this is proved.

    Args:
        loss: The model with its loss, whole on every process; changed in place.
        layers: Its transformer layers.
        processes: This process and its mesh.
        config: The run.
    """
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    assert processes.mesh is not None
    device = processes.accelerator.device if processes.accelerator is not None else torch.device("cpu")
    mesh = processes.mesh["shard"] if processes.mesh.size(0) == 1 else processes.mesh
    whole: set[nn.Parameter] = set()  # one process has nothing to gather, and torch no way for codes with their scales
    for module in layers:
        again = config.parallel.reshard_after_forward
        held = hold_in_four_bits(_masters(module, dtype), device)
        whole |= held if mesh.size() == 1 else set()
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=again, ignored_params=held & whole)
    fully_shard(_masters(loss, dtype), mesh=mesh, mp_policy=policy, ignored_params=whole)


def _masters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module in float32, its frozen parameters in `dtype`."""
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    if not frozen:
        return module.float()
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor) and not is_quantised(parameter):  # of a layer that is done already
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    for buffer in module.buffers():
        buffer.data = buffer.data.float() if buffer.is_floating_point() else buffer.data
    return module


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gather a sharded layer's parameters for a while, outside of its own turn; does nothing where it isn't sharded."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def full_tensor(x: Tensor) -> Tensor:
    """A tensor that may be sharded, in full; all processes call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def sequence_groups(world: int, size: int) -> list[list[int]]:
    """Ranks that share a row, group by group: neighbours, so that a row of one host's GPUs stays inside that host."""
    return [list(range(first, first + size)) for first in range(0, world, size)]


@contextmanager
def connect(config: TrainConfig) -> Iterator[Processes]:
    """Join the processes of the run, and leave the group at the end if this call made it.

    An error raised inside carries a note that names this process's rank and host, where there are several processes.

    Raises:
        ValueError: The number of processes does not fit `parallel.context_parallel_size` or `global_batch_size`.
    """
    with launched(config) as accelerator:
        yield grouped(config, accelerator)


@contextmanager
def launched(config: TrainConfig) -> Iterator[Accelerator]:
    """As `connect`, before it is known how the processes share rows."""
    mine = not dist.is_initialized()
    timeout = timedelta(minutes=config.parallel.timeout_minutes) + SPARE
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if config.dtype == "bfloat16" else "no",
        log_with=make_trackers(config.trackers, config.out) or None,
        project_dir=config.out,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    try:
        yield accelerator
    except Exception as error:
        if accelerator.num_processes > 1:
            rank, size = accelerator.process_index, accelerator.num_processes
            error.add_note(f"This is rank {rank} of {size}, on host {socket.gethostname()}.")
        raise
    finally:
        accelerator.free_memory()
        # accelerate keeps one state per interpreter; without this a second run could not choose another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
        if mine and dist.is_initialized():
            dist.destroy_process_group()


def grouped(config: TrainConfig, accelerator: Accelerator) -> Processes:
    """This process's place in the groups that the config asks for; all processes call it.

    Raises:
        ValueError: See `connect`.
    """
    world, sequence = accelerator.num_processes, config.parallel.shared_by
    if problem := process_problem(config, world):
        raise ValueError(problem)
    mesh, shard = None, config.parallel.fsdp_shard_degree
    if shard is not None:
        if not dist.is_initialized():  # one process alone: nothing is shared, but FSDP2 needs a group
            backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        shape, names = (world // shard, shard), ("replicate", "shard")
        mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=names)
    group, timeout = None, timedelta(minutes=config.parallel.timeout_minutes) + SPARE
    for ranks in sequence_groups(world, sequence) if sequence > 1 else ():
        options = nccl_options() if accelerator.device.type == "cuda" else None
        made = dist.new_group(ranks, timeout=timeout, pg_options=options)
        group = made if accelerator.process_index in ranks else group
    return Processes(accelerator, sequence, group, mesh)


def on_main(work: Callable[[], T], accelerator: Accelerator) -> T:
    """What the main process finds, on all processes, which all call this; none waits for one that has failed.

    Raises:
        BaseException: What `work` raised, of the same type on every process; RuntimeError where it can't be sent.
    """
    if accelerator.num_processes == 1:
        return work()
    told: list[Any] = [None, None]
    own: BaseException | None = None
    if accelerator.is_main_process:
        try:
            told[0] = work()
            pickle.dumps(told[0])  # what can't be sent fails here, where the others are told of it
        except BaseException as error:  # noqa: BLE001 - raised below, a Ctrl-C too
            own, told = error, [None, _sendable(error)]
    try:
        dist.broadcast_object_list(told)
    except Exception:
        if own is not None:  # the others have ended already, as a Ctrl-C ends all
            raise own from None
        raise
    if told[1] is not None:
        if own is None:
            told[1].add_note("Raised by the main process, rank 0.")
        raise told[1] from own  # at one line on all, so that those of a host say it once
    return told[0]


def _sendable(error: BaseException) -> BaseException:
    """An error as other processes can raise it; what does not survive pickling keeps its type's name and its words."""
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - made here, as the broadcast will
    except Exception:  # noqa: BLE001 - a type may fail in any way
        copy = None
    if type(copy) is type(error) and str(copy) == str(error):
        return copy
    return RuntimeError(f"{type(error).__name__}: {error}")
