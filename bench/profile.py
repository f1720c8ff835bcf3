"""Where a decode step's time goes by operation, against what its bytes and arithmetic take at least on this machine.

python -m bench.profile [--tp N] [--threads N] [--batch B] [--context C] [--steps S] [--dtype D] [--quantization int8]
"""

import argparse

from rich.console import Console

from model_parallel.checkpoint.detect import describe
from model_parallel.config import ParallelConfig
from serving.bench.engine import Limit, shape_name
from serving.bench.profile import as_table, profile_decode
from serving.bench.timing import Workload
from serving.fetch import resolve_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a known name, or a checkpoint's path")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of each rank")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=32, help="prompt tokens; --steps more are decoded")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="")
    arguments = parser.parse_args()
    path = resolve_source(arguments.model)
    model = describe(path).config
    parallel = ParallelConfig(
        tp_size=arguments.tp,
        num_threads=arguments.threads,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
    )
    workload = Workload(arguments.batch, arguments.context, arguments.steps)
    profile = profile_decode(path, parallel, workload, vocab_size=model.vocab_size)
    limit = Limit(model, bytes_per_weight=2, num_threads=arguments.tp * arguments.threads, name="limit")
    limit.measure()
    # A rank has its part of the machine's cores, and so of their bandwidth and arithmetic.
    bandwidth, rate = limit.bandwidths[0] / arguments.tp, limit.rates[0] / arguments.tp
    title = f"{shape_name(parallel)}, batch {arguments.batch}, context {arguments.context} and more"
    console = Console(width=120, highlight=False)
    console.print(as_table(profile.rows(bandwidth=bandwidth, rate=rate), title))
    console.print(f"mean of {profile.num_steps} steps of rank 0; {limit.detail}, shared by {arguments.tp} ranks")


if __name__ == "__main__":
    main()
