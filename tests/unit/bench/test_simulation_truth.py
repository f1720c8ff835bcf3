"""The comparison with the real stack: here a simulation stands for that, so that what should come out is known."""

import json
import math
import random
from pathlib import Path

import msgspec
import pytest

from bench.simulation.profiles import StepsFile
from bench.simulation.report import Columns
from bench.simulation.requests import Status
from bench.simulation_truth import as_json, as_table, checks, compare
from bench.truth.recording import LoadRecord, Recording, Sent, ShapeRecord, read_recording, write_recording
from bench.truth.simulating import MEAN_PACE, Pace, run_fleet, step_cost
from model_parallel.engine.step_times import StepSample, StepWork
from model_parallel.errors import ConfigError
from serving.contracts.step_report import GroupShape, StepReport

REQUEST_S = 0.004
TRUE = StepsFile(
    origin="", model="m", tensor_parallel_size=1, dtype="bfloat16", quantization="", max_position=2048,
    knots=[(1, 0.008), (16, 0.012), (512, 0.4)], row_s=1e-4, context_s=1e-6, pair_s=1e-7, empty_s=1e-4,
    num_steps=0, median_error=0.0, p90_error=0.0, request_s=REQUEST_S,
)  # fmt: skip
SHAPE = GroupShape(
    group="g", model="m", tensor_parallel_size=1, dtype="bfloat16", quantization="", max_position=2048
)  # fmt: skip


def load(requests: list[Sent], steps: list[StepReport], num_preempted: int = 0, **told: object) -> LoadRecord:
    return LoadRecord(
        mix="short", began_s=0.0, seconds=10.0, late_s=0.0, client_cpu_s=0.0, gateway_cpu_s=0.0, num_preempted=num_preempted,
        requests=requests, steps=steps, **told,  # type: ignore[arg-type]
    )  # fmt: skip


def real_shape(true: StepsFile = TRUE) -> ShapeRecord:
    """What would be measured if the machine were exactly as `true` says."""
    draw, cost = random.Random(1), step_cost(true)
    samples = []
    for number in range(600):
        decodes, prefill = draw.randrange(1, 17), draw.choice((0, 0, draw.randrange(20, 400)))
        work = StepWork(decodes + prefill, decodes, decodes * draw.randrange(20, 400), prefill * prefill / 2)
        samples.append(StepSample(work, cost.seconds(work), float(number)))
    alone = []
    for number in range(20):
        prompt = draw.randrange(30, 100)
        work = StepWork(prompt, 0, 0, prompt * prompt / 2)
        took_s = true.request_s + cost.seconds(work)
        samples.append(StepSample(work, cost.seconds(work), number + took_s - true.request_s / 2))
        alone.append(Sent(number, prompt, 2, "OK", number + took_s, number + took_s + 0.01))
    return ShapeRecord(
        num_groups=1,
        tp_size=1,
        capacity={"short": 10.0},
        calibration=[load(alone, [StepReport(shape=SHAPE, samples=tuple(samples))], num_streams=1)],
        cells=[answered(true, MEAN_PACE, [])],
    )


def answered(true: StepsFile, pace: Pace, steps: list[StepReport]) -> LoadRecord:
    """Requests that come faster than they can be answered, and what became of them."""
    draw = random.Random(2)
    arrivals = [
        Sent(draw.uniform(0, 10), draw.randrange(30, 100), draw.randrange(30, 100), "OK", None, 0.0) for _ in range(120)
    ]
    arrivals.sort(key=lambda sent: sent.at_s)
    fleet = run_fleet(true, arrivals, 1, 0, [(0.0, pace)])
    columns = Columns(fleet)
    requests = [
        msgspec.structs.replace(
            sent,
            code="OK" if columns.status[index] == Status.FINISHED else "RESOURCE_EXHAUSTED",
            first_s=sent.at_s + float(columns.ttft_s[index]) if columns.status[index] == Status.FINISHED else None,
            ended_s=sent.at_s + float(columns.e2e_s[index]),
        )
        for index, sent in enumerate(arrivals)
    ]
    return load(requests, steps, fleet.num_preemptions, share=1.2, rate=12.0)


def num_wrong(shape: ShapeRecord, simulated_as: str = "simulated") -> int:
    cells = compare(shape)["cells"]
    assert "**" in as_table(cells) or "short" in as_table(cells)
    return checks(cells, simulated_as).count(False)


def slower_machine(decodes: float, prompts: float) -> ShapeRecord:
    """One that is as slow as this in the open loop alone, as its own steps tell."""
    shape, pace = real_shape(), Pace(decodes, prompts)
    samples = [
        msgspec.structs.replace(sample, seconds=sample.seconds * pace[sample.work.num_tokens > sample.work.num_decodes])
        for sample in shape.calibration[0].steps[0].samples
    ]
    cell = answered(TRUE, pace, [StepReport(shape=SHAPE, samples=tuple(samples))])
    return msgspec.structs.replace(shape, cells=[cell])


def test_a_machine_that_is_as_the_model_says_is_found_again() -> None:
    shape = real_shape()
    assert num_wrong(shape) == 0
    slower = msgspec.structs.replace(TRUE, knots=[(tokens, 1.5 * seconds) for tokens, seconds in TRUE.knots])
    assert num_wrong(msgspec.structs.replace(shape, cells=real_shape(slower).cells)) > 3


@pytest.mark.parametrize(("decodes", "prompts"), [(1.5, 1.5), (1.0, 1.6), (1.6, 1.0)])
def test_a_machine_that_was_slower_in_a_load_is_told_from_a_wrong_model(decodes: float, prompts: float) -> None:
    shape = slower_machine(decodes, prompts)
    assert num_wrong(shape) == 0
    assert num_wrong(shape, "simulated_at_mean_pace") > 1


def test_a_pace_hides_no_wrong_queue() -> None:
    """Twice as many groups as there were."""
    assert num_wrong(msgspec.structs.replace(slower_machine(1.5, 1.5), num_groups=2)) > 3


def test_a_figure_that_nothing_was_measured_of_is_null() -> None:
    shapes = [{"num_groups": 1, "cells": [{"real": [{"tpot_p99_s": math.nan, "tokens_per_s": 1.234567}]}]}]
    read = json.loads(as_json({"num_cores": 2}, shapes), parse_constant=pytest.fail)
    assert read["shapes"][0]["cells"] == [{"real": [{"tpot_p99_s": None, "tokens_per_s": 1.2346}]}]


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, recording = tmp_path / "recording.json", Recording(machine={"num_cores": 2}, shapes=[real_shape()])
    write_recording(path, recording)
    assert read_recording(path) == recording
    path.write_text("[]")
    with pytest.raises(ConfigError, match="is no recording"):
        read_recording(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_recording(tmp_path / "nothing")
