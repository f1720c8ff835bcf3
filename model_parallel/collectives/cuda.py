"""What ranks on GPUs of their own say to each other: over NCCL, and sums through each other's memory where one host's GPUs allow.

NCCL adds in an order of its own. torch's symmetric-memory sums add in rank order, whatever the size (load_and_reduce in
CUDASymmetricMemory-inl), and take a few microseconds. The host's own link decides: ranks agree on one way when they meet,
and the log says which and why.
"""

import hashlib
import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from model_parallel.collectives.gloo import TorchCollectives
from model_parallel.collectives.interface import Collectives, sum_in_order
from model_parallel.collectives.rendezvous import Rendezvous
from model_parallel.config import ParallelConfig
from model_parallel.errors import GroupFailedError

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 32 << 20
"""Shared memory of each rank; larger tensors are summed piece by piece."""
ONE_SHOT_BYTES = 256 << 10
"""Up to here every rank reads all of all others; above, each sums its part and hands it to the others, with two waits instead
of one. Between two ranks both read as much."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def join_gpus(
    parallel: ParallelConfig, rank: int, rendezvous: Rendezvous, store_listener: socket.socket | None = None
) -> Collectives:
    """The fastest way that the ranks' GPUs allow; all ranks decide alike. Raises GroupFailedError.

    Ranks that share a GPU, as they may in tests, go through the host.
    """
    control = TorchCollectives(parallel, rank, rendezvous, store_listener)
    device = torch.device("cuda", torch.cuda.current_device())
    hosts, gpus = _gather_identities(control, device)
    if len(set(gpus)) < len(gpus):
        logger.warning("collectives: Gloo through the host (slow), because ranks share a GPU and NCCL needs one a rank")
        return control
    nccl = NcclCollectives(parallel, rank, rendezvous, control)
    reason = "the ranks are on several hosts" if len(set(hosts)) > 1 else ""
    if not reason:
        workspace = _open_workspace(device)
        failed = [r for r, ok in enumerate(control.all_gather(torch.tensor(isinstance(workspace, Tensor)))) if not ok]
        if isinstance(workspace, Tensor) and not failed:
            control.close()
            logger.info("collectives: torch symmetric memory for sums, NCCL for the rest")
            return SymmetricCollectives(nccl, workspace)
        reason = f"rank {failed[0]} cannot share memory: {workspace if rank == failed[0] else 'see its log'}"
    control.close()
    logger.info("collectives: NCCL, because %s", reason)
    return nccl


class NcclCollectives:
    """Calls only enqueue work. NCCL's watchdog ends the process when the work is not done after step_timeout_s.

    torch's global process group, which a process has for one group of ranks.
    """

    in_rank_order = False
    only_enqueue = True

    def __init__(self, parallel: ParallelConfig, rank: int, rendezvous: Rendezvous, control: TorchCollectives) -> None:
        """Connects, over the store that `control` has met in. Raises GroupFailedError."""
        self.rank = rank
        self.size = parallel.tp_size
        timeout = timedelta(seconds=parallel.step_timeout_s)
        # The watchdog aborts the communicator, then the process: the leader hears of it as of any rank that died.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
        if rendezvous.store_path:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # ranks of one host meet where nobody else listens
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)  # absent from CPU builds of torch
        options._timeout = timeout
        device = torch.device("cuda", torch.cuda.current_device())
        try:
            dist.init_process_group(
                "nccl",
                store=PrefixStore("nccl", control.store),
                rank=rank,
                world_size=self.size,
                timeout=timeout,
                pg_options=options,
                device_id=device,
            )
            self.barrier()
        except RuntimeError as error:
            raise GroupFailedError(f"rank {rank} could not meet its peers over NCCL: {error}") from error

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._run("all_reduce", lambda: dist.all_reduce(x))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty((self.size, *x.shape))
        if x.numel() == 0:
            return gathered
        # As bytes, so that NCCL need not know the dtype.
        target, source = (tensor.view(-1).view(torch.uint8) for tensor in (gathered, x.contiguous()))
        self._run("all_gather", lambda: dist.all_gather_into_tensor(target, source))
        return gathered

    def barrier(self) -> None:
        self.all_gather(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _run(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise GroupFailedError(f"rank {self.rank}: {name} failed: {error}") from error


class SymmetricCollectives:
    """Sums of float32 through memory that all ranks of a host have mapped, added in rank order; the rest over NCCL.

    A kernel that waits for a peer waits for ever. The leader's step_timeout_s ends it, with the process.
    """

    in_rank_order = True
    only_enqueue = True

    def __init__(self, nccl: NcclCollectives, workspace: Tensor) -> None:
        """`workspace`: float32, of `_open_workspace` on every rank. Raises GroupFailedError when a first sum is wrong."""
        self.rank = nccl.rank
        self.size = nccl.size
        self._nccl = nccl
        self._workspace = workspace
        self._group_name = _world().group_name
        for num_elements in (ONE_SHOT_BYTES // 4, ONE_SHOT_BYTES):  # both ways of summing
            total = self.all_reduce(torch.ones(num_elements, device=workspace.device))
            if not bool((total == self.size).all()):
                raise GroupFailedError(f"rank {self.rank}: sums through symmetric memory are wrong")

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return sum_in_order(self.all_gather(x))
        if x.numel() == 0:
            return x
        sums = [self._sum(part) for part in x.contiguous().view(-1).split(self._workspace.numel())]
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).view_as(x)

    def _sum(self, x: Tensor) -> Tensor:
        buffer = self._workspace[: x.numel()]
        if self.size == 2 or x.nbytes <= ONE_SHOT_BYTES:
            total: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, x, "sum", self._group_name)
            return total
        buffer.copy_(x)
        torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", self._group_name)
        return buffer.clone()

    def all_gather(self, x: Tensor) -> Tensor:
        return self._nccl.all_gather(x)

    def barrier(self) -> None:
        self._nccl.barrier()

    def close(self) -> None:
        self._nccl.close()


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None  # NcclCollectives made it
    return world


def _gather_identities(control: TorchCollectives, device: torch.device) -> tuple[list[bytes], list[bytes]]:
    """The host and the GPU of each rank, as digests."""
    names = (_BOOT_ID.read_text(), str(torch.cuda.get_device_properties(device).uuid))
    digests = b"".join(hashlib.sha256(name.encode()).digest() for name in names)
    gathered = [bytes(row) for row in control.all_gather(torch.tensor(list(digests), dtype=torch.uint8)).tolist()]
    return [row[:32] for row in gathered], [row[32:] for row in gathered]


def _open_workspace(device: torch.device) -> Tensor | str:
    """This rank's part of the shared memory, mapped by all ranks; or why there is none."""
    # A rank is shown its own GPU alone, and torch takes the others' for the same one: all are device 0.
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    try:
        workspace = symm_mem.empty(WORKSPACE_BYTES // 4, dtype=torch.float32, device=device)
        symm_mem.rendezvous(workspace, _world())
        return workspace
    except RuntimeError as error:  # whatever driver, topology or container do not allow
        logger.warning("no symmetric memory: %s", error)
        return str(error).split("\n", maxsplit=1)[0]
