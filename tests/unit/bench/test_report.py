"""Figures become tables, decisions and plots."""

import mmap
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.engine_timing import floor_s
from bench.machine import processor_name
from bench.markdown import begin, end, replace_section
from bench.memory_growth import SAMPLE_S, Usage, judge
from bench.plots import draw_all, step_floor_s
from bench.report import PAGE, SECTIONS, render_engine, render_growth, write_page
from bench.stats import fit_line, growth
from bench.targets import LIMIT_BF16, decisions
from bench.timing import WORKLOADS, Timing, Workload

MACHINE = {
    "date": "2026-01-02", "num_cores": 2, "processor": "a CPU", "memory_gib": 24, "torch": "2", "load_average": 0.1,
}  # fmt: skip


def engine_result(seconds: dict[str, float]) -> dict[str, Any]:
    """Every engine takes as long for every work."""
    ours = {"tp1": 1, "tp2": 2}
    return {
        "machine": MACHINE,
        "num_repeats": 3,
        "contenders": [
            {"name": name, "detail": "x", "ready_s": 2.0, "tp_size": tp_size, "weights": "bfloat16"}
            for name, tp_size in ours.items()
        ],
        "missing": {"vLLM-CPU": "not installed"},
        "timings": [
            Timing(contender=name, workload=work, seconds=(took_s,)).as_data()
            for name, took_s in seconds.items()
            for work in WORKLOADS
        ],
    }


def growth_result() -> dict[str, Any]:
    points = [[1, 128, 0.010], [8, 128, 0.020], [1, 256, 0.011], [1, 512, 0.013], [8, 512, 0.04]]
    shape = {"name": "TP=1", "points": points}
    return {
        "machine": MACHINE, "shapes": [shape, shape | {"name": "TP=2"}], "batch_context": 128, "num_parameters": 1_000_000,
        "bytes_per_weight": 2, "kv_bytes_per_token": 1000, "limit": "slow", "bandwidth": 1e9, "rate": 1e10,
    }  # fmt: skip


def test_verdicts_take_the_better_shape_and_name_what_was_not_measured() -> None:
    text = decisions(engine_result({"tp1": 1.0, "tp2": 0.5, "llama.cpp BF16": 0.7, LIMIT_BF16: 0.3}))
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in text.splitlines()}
    assert rows["1 × 32→128, bfloat16: times llama.cpp BF16"].endswith("| ≥ 1.2 | 0.70 | 1.40 | yes |")
    assert rows[f"1 × 32→128, bfloat16: times {LIMIT_BF16}"].endswith("| 0.30 | 0.60 | **no** |")
    assert rows["8 × 128→128, bfloat16: times vLLM-CPU"].endswith("| not measured | not measured | not measured |")
    assert rows["1 × 1024→4, bfloat16: TP=2 times TP=1"].endswith("| ≥ 0.85 | - | 2.00 | yes |")


def test_a_missing_peer_is_named_in_the_table_of_engines() -> None:
    text = render_engine(engine_result({"tp1": 1.0}))
    assert "| tp1 | 128.0 | 1024.0 | 4096.0 | 1.00 s | 2.0 s |" in text
    assert "- vLLM-CPU: **not installed**" in text


def test_growth_tells_cost_limit_and_lines() -> None:
    text = render_growth(growth_result())
    assert "| 8 | 2.50 | 2.50 | 0.38 | 15% |" in text
    assert "| TP=1, batch 1 | 9.00 ms | 7.81 ms | 1.0000 |" in text


def test_plots_are_drawn_the_same_each_time(tmp_path: Path) -> None:
    first, second = (draw_all(growth_result(), tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == ["throughput.svg", "cost-per-token.svg", "context.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_step_is_bound_by_memory_or_by_arithmetic() -> None:
    assert step_floor_s(growth_result(), 1, 1000) == pytest.approx(3e-3)
    assert step_floor_s(growth_result() | {"kv_bytes_per_token": 0}, 100, 1000) == pytest.approx(20e-3)


@pytest.mark.parametrize(
    ("workload", "tokens_per_s"), list(zip(WORKLOADS, (119.9, 558.7, 648.7, 4.87), strict=True)), ids=str
)
def test_the_floor_of_work(workload: Workload, tokens_per_s: float) -> None:
    """SmolLM2 in bfloat16 at 33 GB/s and 349 GFLOP/s, against the figures that another program gave for the same machine."""
    took_s = floor_s(workload, num_parameters=134_515_008, bytes_per_weight=2, bandwidth=33e9, rate=349e9)
    assert workload.batch * workload.num_new_tokens / took_s == pytest.approx(tokens_per_s, rel=1e-3)


def test_a_section_is_replaced_and_nothing_else() -> None:
    text = f"a\n{begin('x')}\nold\n{end('x')}\nb {begin('y')}{end('y')}"
    assert replace_section(text, "x", "new") == f"a\n{begin('x')}\nnew\n{end('x')}\nb {begin('y')}{end('y')}"
    assert replace_section(replace_section(text, "x", "new"), "x", "old") == text
    for broken in (f"{begin('x')} only", f"{end('x')}{begin('x')}", text + begin("x")):
        with pytest.raises(ValueError, match="once each"):
            replace_section(broken, "x", "new")


def test_the_page_has_every_section_and_says_what_is_not_measured() -> None:
    text = write_page(PAGE.read_text(encoding="utf-8"), {})
    assert text.count("Not measured yet: `python -m bench.") == len(SECTIONS)


def test_a_line_and_growth() -> None:
    line = fit_line([0, 1, 2, 3], [1.0, 3.0, 5.0, 7.0])
    assert line == pytest.approx((1.0, 2.0, 1.0))
    assert fit_line([0, 1, 2], [1.0, 0.0, 1.0]).r_squared == pytest.approx(0.0)
    assert growth([10, 10, 99, 12, 13, 14, 15, 16, 17, 18, 19, 20, 20, 20, 20, 0, 20, 20, 20, 20], 0.15) == 10


def test_memory_is_judged_over_all_processes_and_after_the_warm_up() -> None:
    flat = [Usage(100, 10, 5)] * 100
    rising = [Usage(0, 0, 0)] * 20 + [Usage(1_000_000 + 60_000 * i, 10, 5) for i in range(80)]
    within = judge({"a": flat, "b": flat}, 20)
    assert (within["growth_bytes"], within["holds"]) == (0, True)
    beyond = judge({"a": flat, "b": rising, "c": rising}, 20)
    assert beyond["growth_bytes"] == pytest.approx(2 * 72 * 60_000)
    assert beyond["holds"] is False
    assert beyond["processes"][1]["slope_bytes_per_hour"] == pytest.approx(60_000 * 3600 / SAMPLE_S)


def test_a_leak_of_descriptors_or_threads_does_not_hold() -> None:
    for last in (Usage(100, 20, 5), Usage(100, 10, 15)):
        leaking = judge({"a": [Usage(100, 10, 5)] * 50 + [last] * 50}, 10)
        assert (leaking["growth_bytes"], leaking["holds"]) == (0, False)


def test_memory_is_what_a_process_holds_itself(tmp_path: Path) -> None:
    """A mapped file can be dropped and is not counted, memory of its own is."""
    num_bytes = 64 << 20
    path = tmp_path / "file"
    path.write_bytes(bytes(num_bytes))
    before = Usage.of(psutil.Process())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        with_file = Usage.of(psutil.Process())
        own = mmap.mmap(-1, num_bytes)
        own.write(bytes([1]) * num_bytes)
        with_own = Usage.of(psutil.Process())
        own.close()
    # A tenth, because the interpreter itself allocates meanwhile, and keeps a buffer of 64 MiB or not.
    assert with_file.held_bytes - before.held_bytes < num_bytes / 10
    assert with_own.held_bytes - with_file.held_bytes > 0.9 * num_bytes
    assert before.num_threads >= 1
    assert with_own.num_fds >= before.num_fds


def test_the_processor_is_named_with_its_widest_instructions() -> None:
    info = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: sse avx2 avx512f\n"
    assert processor_name(info) == "A CPU (avx512f)"
