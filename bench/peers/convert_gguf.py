"""Writes a GGUF model in another type. Run in llama.cpp's environment: python -m bench.peers.convert_gguf SOURCE TARGET TYPE"""

import sys

import llama_cpp

TYPES = {"bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}


def convert(source: str, target: str, type_name: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[type_name]
    params.allow_requantize = True
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), params)
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status} for {target}")


if __name__ == "__main__":
    convert(*sys.argv[1:])
