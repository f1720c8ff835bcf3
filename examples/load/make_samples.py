"""Writes the sample files beside it. They are made up: nobody's data, in the formats that others publish.

python examples/load/make_samples.py
"""

import csv
import json
import math
import random
from datetime import datetime, timedelta
from pathlib import Path

HERE = Path(__file__).parent
NUM_REQUESTS = 60
BEGAN = datetime(2026, 1, 1, 12, 0, 0)
TOPICS = ("tea", "rivers", "bread", "trains", "stars", "chess")


def arrivals(draw: random.Random, rate: float) -> list[float]:
    at_s, times = 0.0, []
    for _ in range(NUM_REQUESTS):
        at_s += draw.expovariate(rate)
        times.append(at_s)
    return times


def length(draw: random.Random, mean: float) -> int:
    return max(2, min(512, round(draw.lognormvariate(math.log(mean) - 0.32, 0.8))))


def write_csv(name: str, columns: list[str], rows: list[list[object]]) -> None:
    with (HERE / name).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def main() -> None:
    draw = random.Random(0)
    azure = [
        [(BEGAN + timedelta(seconds=at_s)).strftime("%Y-%m-%d %H:%M:%S.%f") + "0", length(draw, 96), length(draw, 24)]
        for at_s in arrivals(draw, 3.0)
    ]
    write_csv("azure.csv", ["TIMESTAMP", "ContextTokens", "GeneratedTokens"], azure)
    columns = ["Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type"]
    burst = []
    for at_s in arrivals(draw, 3.0):
        asked, answered = length(draw, 64), length(draw, 24)
        burst.append([round(at_s, 3), "ChatGPT", asked, answered, asked + answered, "Conversation log"])
    write_csv("burstgpt.csv", columns, burst)
    lines = []
    for at_s in arrivals(draw, 3.0):
        blocks = [draw.randrange(4)] if draw.random() < 0.7 else [draw.randrange(100, 1000)]
        lines.append(
            {
                "timestamp": round(at_s * 1e3), "input_length": 256 + length(draw, 64), "output_length": length(draw, 24),
                "hash_ids": blocks,
            }
        )  # fmt: skip
    (HERE / "mooncake.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [[round(at_s, 3), length(draw, 64), length(draw, 24)] for at_s in arrivals(draw, 3.0)]
    write_csv("trace.csv", ["timestamp", "input_tokens", "output_tokens"], rows)
    prompts = [{"prompt": f"Tell me something about {topic}.", "output_tokens": length(draw, 24)} for topic in TOPICS]
    (HERE / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    conversations = [
        {
            "id": f"made-up-{number}",
            "conversations": [
                {"from": "human", "value": f"What do you know about {topic}?"},
                {"from": "gpt", "value": "Some things."},
                {"from": "human", "value": "Say it in one sentence."},
                {"from": "gpt", "value": "Here it is."},
            ],
        }
        for number, topic in enumerate(TOPICS)
    ]
    (HERE / "sharegpt.json").write_text(json.dumps(conversations, indent=1) + "\n")


if __name__ == "__main__":
    main()
