"""llama.cpp as a peer. Run in its environment: python -m bench.peers.run_llama_cpp MODEL.gguf NUM_THREADS

Sequences are decoded together in one batch, each with a cache of its own length, which is llama.cpp's fastest way.
"""

import ctypes
import sys
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np

from bench.peers.worker import Generate, Prompts, serve

MAX_BATCH_TOKENS = 2048
LENGTH_STEP = 256
"""A sequence's cache is a multiple of this anyway; so a short warm-up makes the context that the timed run uses."""


class LlamaCpp:
    """One model, and a context for the shape of work at hand."""

    def __init__(self, path: str, num_threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._num_threads = num_threads
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)
        self._context: Any = None
        self._shape = (0, 0)

    def generate(self, prompts: Prompts, num_new_tokens: int) -> int:
        length = len(prompts[0]) + num_new_tokens
        self._prepare(len(prompts), -(-length // LENGTH_STEP) * LENGTH_STEP)
        last = self._prefill(prompts)
        num_tokens = len(last)
        for step in range(num_new_tokens - 1):
            position = len(prompts[0]) + step
            last = self._decode([(token, position, sequence, True) for sequence, token in enumerate(last)])
            num_tokens += len(last)
        return num_tokens

    def _prepare(self, num_sequences: int, length: int) -> None:
        if (num_sequences, length) != self._shape:
            if self._context:
                llama_cpp.llama_free(self._context)
            params = llama_cpp.llama_context_default_params()
            params.n_ctx = num_sequences * length
            params.n_seq_max = num_sequences
            params.n_batch = MAX_BATCH_TOKENS
            params.n_threads = params.n_threads_batch = self._num_threads
            self._context = llama_cpp.llama_init_from_model(self._model, params)
            if not self._context:
                raise RuntimeError(f"llama.cpp makes no context of {num_sequences} sequences of {length} tokens")
            self._shape = (num_sequences, length)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _prefill(self, prompts: Prompts) -> list[int]:
        """The first new token of every prompt."""
        entries = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        first: list[int] = []
        for start in range(0, len(entries), MAX_BATCH_TOKENS):
            first += self._decode(entries[start : start + MAX_BATCH_TOKENS])
        return first

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, whether to draw the next); the most likely next tokens."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, draws) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = draws
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        return [self._most_likely(index) for index, entry in enumerate(entries) if entry[3]]

    def _most_likely(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        array_type = ctypes.POINTER(ctypes.c_float * self._vocab_size)
        return int(np.frombuffer(ctypes.cast(logits, array_type).contents, dtype=np.float32).argmax())


def load() -> tuple[Generate, str]:
    path, num_threads = sys.argv[1], int(sys.argv[2])
    return LlamaCpp(path, num_threads).generate, f"llama-cpp-python {version('llama-cpp-python')}"


if __name__ == "__main__":
    serve(load)
