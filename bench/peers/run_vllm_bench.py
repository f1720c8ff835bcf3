"""`vllm bench serve` with its own arguments, in vLLM's environment: python -m bench.peers.run_vllm_bench --base-url …

vLLM's command asks for the metadata of a package of another name than that of its CPU build; its benchmark does not.
"""

import argparse

from vllm.benchmarks.serve import add_cli_args, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args())
