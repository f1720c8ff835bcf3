"""Arithmetic of a step profile."""

import json

import pytest
import torch

from model_parallel.runtime.profile import REST, Cost, StepProfile

CPU = torch.device("cpu")


def test_a_step_is_its_operations_and_the_rest() -> None:
    profile = StepProfile()
    calls = [("product", lambda: Cost(1000, 10)), ("norm", lambda: Cost(100)), ("product", lambda: Cost(3000, 90))]
    for _ in range(2):
        profile.add_program(calls, [4000, 1000, 6000])
        profile.end_step(20e-6, counts=True)
    product, norm, rest, step = profile.rows(bandwidth=1e9, rate=1e7)
    assert (product.operation, product.num_calls, norm.num_calls) == ("product", 2, 1)
    assert product.seconds == pytest.approx(10e-6) and product.share == pytest.approx(0.5)
    assert product.floor_s == pytest.approx(10e-6)  # by arithmetic; by bytes it would be 4
    assert norm.floor_s == pytest.approx(0.1e-6) and norm.ratio == pytest.approx(10)
    assert rest.operation == REST and rest.seconds == pytest.approx(9e-6)
    assert step.seconds == pytest.approx(20e-6) and step.floor_s == pytest.approx(10.1e-6)


def test_steps_that_record_or_do_not_count_are_forgotten() -> None:
    profile = StepProfile()
    double = profile.timed(lambda x: 2 * x, lambda out, x: (f"double {x}", lambda: Cost(8)), CPU)
    recorded = profile.record()
    assert double(3) == 6
    profile.end_step(1.0, counts=True)
    assert [name for name, _ in recorded] == ["double 3"]
    double(4)
    profile.end_step(1.0, counts=False)
    assert (profile.num_steps, dict(profile.totals)) == (0, {})
    double(5)
    profile.end_step(1.0, counts=True)
    assert list(profile.totals) == ["double 5"] and len(recorded) == 1


def test_a_profile_travels_as_json() -> None:
    profile = StepProfile()
    profile.add_program([("norm", lambda: Cost(7, 8))], [9])
    profile.end_step(1.0, counts=True)
    copy = StepProfile.from_data(json.loads(json.dumps(profile.as_data())))
    assert copy.rows(bandwidth=1, rate=1) == profile.rows(bandwidth=1, rate=1)
