"""A small tokenizer with Llama 2's rules, trained on the spot."""

from functools import cache
from io import BytesIO

import sentencepiece

CORPUS = """The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital of France.
[INST] <<SYS>> You are a helpful, respectful and honest assistant. <</SYS>> [/INST] Hello, how are you today?
def main(argument): return [number * 2 for number in range(10) if number % 3 == 0]  # comment
Les élèves français étudient à l'école. Straße, größer, über. 1234567890 3.14159 2,000
In the beginning the world was without form; the sentences that follow are there so that merges can be learnt.
""".splitlines()


@cache
def sentencepiece_model() -> bytes:
    """A sentencepiece BPE of 500 pieces: byte fallback, dummy prefix, ids of <unk>, <s>, </s> as in Llama 2."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()
