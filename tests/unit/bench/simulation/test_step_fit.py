import random
from codecs import BOM_UTF8
from pathlib import Path

import msgspec
import pytest

from bench.simulation.cost import StepCost
from bench.simulation.fit import encode_profile, fit, fit_cost, read_samples
from bench.simulation.profiles import StepsFile, read_profile
from model_parallel.engine.messages import Row, StepPlan, StepResult
from model_parallel.engine.step_times import MAX_SAMPLES, StepSample, StepWork, TimedExecutor
from model_parallel.errors import ConfigError
from serving.contracts.step_report import GroupShape, StepReport, to_lines

TRUE = StepCost(knots=((1, 0.02), (8, 0.025), (64, 0.05), (512, 0.4)), row_s=2e-4, context_s=1e-6, pair_s=2e-7)
SHAPE = GroupShape(group="g1", model="m", tensor_parallel_size=1, dtype="bfloat16", quantization="", max_position=2048)


def samples(num: int, noise: float, seed: int = 1) -> list[StepSample]:
    """Steps of a group that costs TRUE, give or take."""
    draw, made = random.Random(seed), []
    for _ in range(num):
        decodes, prefill = draw.randint(0, 16), draw.choice([0, 0, draw.randint(2, 512)])
        if not decodes + prefill:
            continue
        work = StepWork(decodes + prefill, decodes, decodes * draw.randint(1, 2000), prefill * prefill / 2)
        made.append(StepSample(work, TRUE.seconds(work) * draw.uniform(1 - noise, 1 + noise)))
    return made


def test_the_cost_that_made_the_steps_is_found() -> None:
    found = fit_cost(samples(500, noise=0.0))
    for sample in samples(200, noise=0.0, seed=2):
        assert found.seconds(sample.work) == pytest.approx(sample.seconds, rel=0.02)


def test_what_groups_of_one_machine_cost_each_other_is_found() -> None:
    """Two groups, of which the second runs half of the time; both are slower then."""
    sharing, reports, now_s = 0.4, [], 0.0
    for group, begins in (("one", (0.0, 1000.0)), ("two", (0.0,))):
        timed = []
        for begin in begins:
            now_s = begin
            for sample in samples(150, noise=0.05, seed=int(begin) + len(group)):
                factor = 1 + sharing if begin == 0.0 else 1.0
                now_s += sample.seconds * factor
                timed.append(msgspec.structs.replace(sample, seconds=sample.seconds * factor, ended_s=now_s))
        reports.append(StepReport(shape=msgspec.structs.replace(SHAPE, group=group), samples=tuple(timed)))
    profile = fit(reports, origin="a test")
    assert profile.sharing == pytest.approx(sharing, abs=0.05)
    assert fit(reports[:1], origin="one of them").sharing == 0.0
    cost = StepCost(knots=tuple(profile.knots), row_s=profile.row_s, context_s=profile.context_s, pair_s=profile.pair_s)
    for sample in samples(100, noise=0.0, seed=9):
        assert cost.seconds(sample.work) == pytest.approx(sample.seconds, rel=0.1)


def test_noise_and_steps_that_were_held_up_do_not_lead_astray() -> None:
    made = samples(800, noise=0.2)
    held_up = [StepSample(sample.work, sample.seconds * 30) for sample in samples(8, noise=0.2, seed=3)]
    profile = fit([StepReport(shape=SHAPE, samples=tuple(made + held_up))], origin="a test")
    assert f"{len(held_up)} of" in profile.origin
    cost = StepCost(knots=tuple(profile.knots), row_s=profile.row_s, context_s=profile.context_s, pair_s=profile.pair_s)
    for sample in samples(200, noise=0.0, seed=2):
        assert cost.seconds(sample.work) == pytest.approx(sample.seconds, rel=0.15)


@pytest.mark.parametrize(("share", "times"), [(0.05, (6, 20, 100)), (0.3, (20, 100)), (0.3, (1000,))])
def test_many_steps_that_were_held_up_are_all_left_out(share: float, times: tuple[int, ...]) -> None:
    """They lift the first fit, so that the shorter ones do not stand out in it."""
    draw = random.Random(5)
    is_held_up = [draw.random() < share for _ in range(1000)]
    made = [
        StepSample(sample.work, sample.seconds * (draw.choice(times) if held_up else 1))
        for sample, held_up in zip(samples(1000, noise=0.1), is_held_up, strict=False)
    ]
    profile = fit([StepReport(shape=SHAPE, samples=tuple(made))], origin="a test")
    assert f"{sum(is_held_up[: len(made)])} of {len(made)}" in profile.origin
    cost = StepCost(knots=tuple(profile.knots), row_s=profile.row_s, context_s=profile.context_s, pair_s=profile.pair_s)
    for sample in samples(200, noise=0.0, seed=2):
        assert cost.seconds(sample.work) == pytest.approx(sample.seconds, rel=0.15)


def test_lines_are_read_back_and_a_profile_too(tmp_path: Path) -> None:
    reports = [StepReport(shape=SHAPE, samples=tuple(samples(200, noise=0.05)))]
    path = tmp_path / "steps.jsonl"
    path.write_bytes(to_lines(reports))
    assert read_samples(str(path)) == reports
    path.write_bytes(BOM_UTF8 + path.read_bytes())
    assert read_samples(str(path)) == reports
    profile = fit(reports, origin="a test")
    out = tmp_path / "profile.json"
    out.write_bytes(encode_profile(profile))
    read = read_profile(str(out))
    assert isinstance(read, StepsFile)
    assert read == profile
    out.write_bytes(BOM_UTF8 + encode_profile(profile))
    assert read_profile(str(out)) == profile


def test_bad_input_is_named(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text('{"work":[1,1,1,0],"seconds":0.1}\n')
    with pytest.raises(ConfigError, match="line 1: a step comes before the shape"):
        read_samples(str(path))
    path.write_text('{"model": 3}\n')
    with pytest.raises(ConfigError, match="line 1"):
        read_samples(str(path))
    none = to_lines([StepReport(shape=SHAPE, samples=(samples(1, noise=0)[0],))]).splitlines()[0]
    for work, rest, told in (
        ("[1,1,1,0]", '"seconds":0.0', "seconds is 0.0; it must be from 1e-09 to 1e"),
        ("[1,1,1,0]", '"seconds":-1', "seconds is -1.0"),
        ("[1,1,1,0]", '"seconds":1e300', "seconds is 1e.300"),
        ("[1,1,1,0]", '"seconds":1e400', ""),
        ("[1,1,1,0]", '"seconds":NaN', ""),
        ("[1,1,1,0]", '"seconds":1,"ended_s":-1e300', "ended_s is -1e.300"),
        ("[-1,1,1,0]", '"seconds":1', "work.num_tokens is -1"),
        ("[1,1,1,1e300]", '"seconds":1', "work.num_pairs is 1e.300"),
    ):
        path.write_bytes(none + f'\n{{"work":{work},{rest}}}\n'.encode())
        with pytest.raises(ConfigError, match=r"steps\.jsonl, line 2: " + told):
            read_samples(str(path))
    for address in ("http://[::1", "http://:x/", "http://h:99999999/steps"):
        with pytest.raises(ConfigError, match=r"from: http.* cannot be read"):
            read_samples(address)
    with pytest.raises(ConfigError, match="No such file"):
        read_samples(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="at least 50"):
        fit([StepReport(shape=SHAPE, samples=tuple(samples(3, noise=0)))], origin="")
    all_steps = samples(800, noise=0)
    decoding = [sample for sample in all_steps if sample.work.num_decodes == sample.work.num_tokens]
    prompts = [StepSample(StepWork(n, 0, 0, n * n / 2), 0.1) for n in range(1, 100)]
    for some, what in ((decoding, "prompt tokens"), (prompts, "a sequence that decodes")):
        with pytest.raises(ConfigError, match=f"none of the {len(some)} steps has {what}"):
            fit([StepReport(shape=SHAPE, samples=tuple(some))], origin="")
    other = StepReport(shape=msgspec.structs.replace(SHAPE, model="n"), samples=())
    with pytest.raises(ConfigError, match="must all be alike"):
        fit([StepReport(shape=SHAPE, samples=()), other], origin="")
    with pytest.raises(ConfigError, match="there is no group in it"):
        fit([], origin="")


class Clockwork:
    """An executor that takes a second a step."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.plans: list[StepPlan] = []
        self.is_shut_down = False

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)

    def collect(self) -> StepResult:
        self.now_s += 1.0
        return StepResult(1, self.plans.pop(0).step_id)

    def set_failure_callback(self, callback: object) -> None:
        self.callback = callback

    def shutdown(self) -> None:
        self.is_shut_down = True


def plan(step_id: int, num_rows: int = 1) -> StepPlan:
    return StepPlan(epoch=1, step_id=step_id, rows=tuple(Row(n, 4, 1, True) for n in range(num_rows)))


def test_a_step_is_timed_from_the_end_of_the_one_before() -> None:
    inner = Clockwork()
    timed = TimedExecutor(inner, clock=lambda: inner.now_s)
    timed.submit(plan(1))
    timed.submit(plan(2))
    timed.collect()
    timed.collect()
    inner.now_s = 10.0
    timed.submit(plan(3, num_rows=0))
    timed.collect()
    timed.submit(plan(4, num_rows=2))
    timed.collect()
    assert [(sample.work.num_decodes, sample.seconds) for sample in timed.samples] == [(1, 1.0), (1, 1.0), (2, 1.0)]
    assert [sample.ended_s for sample in timed.samples] == [1.0, 2.0, 12.0]
    timed.set_failure_callback(print)
    timed.shutdown()
    assert inner.callback is print
    assert inner.is_shut_down


def test_the_samples_are_bounded() -> None:
    inner = Clockwork()
    timed = TimedExecutor(inner, clock=lambda: inner.now_s)
    for number in range(MAX_SAMPLES + 10):
        timed.submit(plan(number))
        timed.collect()
    assert len(timed.samples) == MAX_SAMPLES
