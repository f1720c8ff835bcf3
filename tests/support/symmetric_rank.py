"""One rank of tests/gpu/test_symmetric_memory.py: `python -m tests.support.symmetric_rank STORE SIZE RANK`."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from model_parallel.collectives.cuda import WORKSPACE_BYTES, SymmetricCollectives, _open_workspace
from model_parallel.collectives.interface import sum_in_order

NO_SYMMETRIC_MEMORY = 3
NUM_ELEMENTS = (1, 2, 7, 576, 64 * 4096 + 3, 512 * 4096, WORKSPACE_BYTES // 4 + 1001)


class _Gloo:
    """In place of NcclCollectives."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def contribution(rank: int, num_elements: int) -> torch.Tensor:
    """Values of very different sizes, whose sum depends on the order of addition."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(num_elements, generator=generator) * 10.0 ** (3 - 2 * rank)


def main(store_path: str, size: int, rank: int) -> int:
    store = dist.FileStore(store_path, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    workspace = _open_workspace(torch.device("cuda", 0))
    if isinstance(workspace, str):
        print(workspace)
        return NO_SYMMETRIC_MEMORY
    collectives = SymmetricCollectives(_Gloo(rank, size), workspace)  # type: ignore[arg-type]
    for num_elements in NUM_ELEMENTS:
        expected = sum_in_order(contribution(r, num_elements) for r in range(size))
        x = contribution(rank, num_elements).cuda()
        for _ in range(3):
            if not torch.equal(collectives.all_reduce(x.clone()).cpu(), expected):
                print(f"the sum of {num_elements} elements is another")
                return 1
    graph = torch.cuda.CUDAGraph()
    x = contribution(rank, 4096).cuda()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        total = collectives.all_reduce(x)
    for _ in range(5):
        graph.replay()
    if not torch.equal(total.cpu(), sum_in_order(contribution(r, 4096) for r in range(size))):
        print("the sum in a graph is another")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
