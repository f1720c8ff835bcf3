"""Streams and their speed at the terminal."""

import sys

from protos import inference_pb2 as pb
from serving.cli.terminal import say
from serving.client.client import Client, StreamTimes

REQUEST_TIMEOUT_S = 600.0


def print_stream(client: Client, request: pb.GenerateRequest) -> tuple[str, StreamTimes, pb.Usage]:
    """Write the answer as it comes. Returns it with its times and usage."""
    chunks, times = client.stream(request, timeout_s=REQUEST_TIMEOUT_S)
    parts: list[str] = []
    usage = pb.Usage()
    for chunk in chunks:
        parts.append(chunk.text)
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
        if chunk.HasField("usage"):
            usage = chunk.usage
    sys.stdout.write("\n")
    return "".join(parts), times, usage


def print_speed(times: StreamTimes, usage: pb.Usage) -> None:
    first = "-" if times.ttft_s is None else f"{times.ttft_s * 1e3:.0f} ms"
    rate = "-" if times.tokens_per_s is None else f"{times.tokens_per_s:.1f} tokens/s"
    lost = f"; its gateway was lost {times.num_resumed} time(s)" if times.num_resumed else ""
    tokens = f"{usage.prompt_tokens} prompt and {usage.completion_tokens} answer tokens"
    say(f"time to first token {first}, then {rate}; {tokens}{lost}")
