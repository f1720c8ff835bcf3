"""What is chosen when nothing is said."""

import json
import struct
from itertools import product
from pathlib import Path

import pytest

from bench.support.synthetic_llama import twin
from model_parallel.checkpoint.detect import CheckpointInfo, describe
from model_parallel.errors import ConfigError
from model_parallel.gpus import Gpu
from model_parallel.machine import Machine
from serving.config import ModelEntry, parse_config
from serving.models.group_spec import check_memory, resolve_models
from serving.models.sizes import Host, choose_sizes, describe_sizes, stored_dtype
from tests.support.effort import rest_by_night

GIB = 1 << 30
MIB = 1 << 20


def host(
    *,
    cpus: int = 8,
    free: int = 32 * GIB,
    gpus: int = 0,
    gpu_free: int = 70 * GIB,
    limit: str = "",
    capability: tuple[int, int] = (9, 0),
) -> Host:
    machine = Machine(
        num_cpus=cpus, num_host_cpus=64, total_memory_bytes=free, available_memory_bytes=free, memory_limit=limit
    )
    found = tuple(
        Gpu(index=i, name="H100", total_bytes=80 * GIB, free_bytes=gpu_free, capability=capability) for i in range(gpus)
    )
    return Host(machine=machine, gpus=found, num_gpus=gpus)


def entry(path: Path, **values: object) -> ModelEntry:
    return ModelEntry.model_validate({"name": "m", "source": str(path), **values})


@pytest.fixture(scope="module")
def info(smollm2_path: Path) -> CheckpointInfo:
    return describe(smollm2_path)


def chosen(info: CheckpointInfo, machine: Host, **values: object) -> ModelEntry:
    return choose_sizes([entry(info.path, **values)], [info], machine)[0]


def test_everything_is_chosen_for_a_cpu(info: CheckpointInfo) -> None:
    one = chosen(info, host())
    assert (one.device, one.dtype, one.threads_per_rank) == ("cpu", "bfloat16", 8)
    assert one.kv_cache_tokens == 2 * GIB // 23_040 // 16 * 16
    line = describe_sizes(one, info.config)
    assert line == (
        "m: 1 rank on cpu, bfloat16 with packed weights (0.09 GiB), 8 threads a rank, KV cache of 93,200 tokens (2.00 GiB), "
        "steps of at most 64 sequences and 512 tokens"
    )


def test_what_is_given_is_kept(info: CheckpointInfo) -> None:
    given = {"device": "cpu", "dtype": "float32", "threads_per_rank": 3, "kv_cache_tokens": 1000}
    one = chosen(info, host(gpus=8), **given)
    assert {name: getattr(one, name) for name in given} == given


@pytest.mark.parametrize(
    ("gpus", "given", "sizes"),
    [
        (0, {}, (64, 512)),
        (1, {}, (256, 2048)),
        (0, {"max_num_seqs": 1000}, (1000, 1000)),
        (1, {"max_num_batched_tokens": 100}, (100, 100)),
        (1, {"max_num_seqs": 7, "max_num_batched_tokens": 9}, (7, 9)),
        (0, {"max_num_seqs": "auto", "max_num_batched_tokens": "auto"}, (64, 512)),
    ],
)
def test_the_largest_step_is_chosen_by_device(
    info: CheckpointInfo, gpus: int, given: dict[str, object], sizes: tuple[int, int]
) -> None:
    one = chosen(info, host(gpus=gpus), **given)
    assert (one.max_num_seqs, one.max_num_batched_tokens) == sizes


def test_ranks_share_the_cpus(info: CheckpointInfo) -> None:
    assert chosen(info, host(cpus=8), tensor_parallel_size=2, num_groups=2).threads_per_rank == 2
    assert chosen(info, host(cpus=1), tensor_parallel_size=2).threads_per_rank == 1
    two = choose_sizes([entry(info.path), entry(info.path)], [info, info], host(cpus=4))
    assert [one.threads_per_rank for one in two] == [2, 2]


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cpu"), (2, "cuda"), (8, "cuda")])
def test_gpus_are_used_when_there_is_one_for_every_rank(gpus: int, device: str, info: CheckpointInfo) -> None:
    assert chosen(info, host(gpus=gpus), tensor_parallel_size=2).device == device


def test_the_cache_takes_what_a_gpu_has_left(info: CheckpointInfo) -> None:
    one = chosen(info, host(gpus=1))
    assert one.kv_cache_tokens is not None
    used = one.kv_cache_tokens * 23_040
    assert 0.85 * 70 * GIB < used < 0.9 * 70 * GIB
    less = chosen(info, host(gpus=1, gpu_free=4 * GIB)).kv_cache_tokens
    assert less is not None and less < one.kv_cache_tokens // 10


def test_how_much_of_a_gpu_may_be_used(info: CheckpointInfo) -> None:
    most, half = (chosen(info, host(gpus=1), memory_utilization=part).kv_cache_tokens for part in (0.9, 0.45))
    assert most is not None and half is not None
    freed = (most - half) * 23_040
    assert freed == pytest.approx(0.45 * 70 * GIB, rel=1e-4)
    assert chosen(info, host()).kv_cache_tokens == chosen(info, host(), memory_utilization=0.1).kv_cache_tokens


def test_a_gpu_that_cannot_be_asked_needs_a_number(info: CheckpointInfo) -> None:
    with pytest.raises(ConfigError, match="give kv_cache_tokens"):
        chosen(info, host(), device="cuda")
    assert chosen(info, host(), device="cuda", kv_cache_tokens=4096).kv_cache_tokens == 4096


def test_little_memory_makes_a_small_cache_and_too_little_is_refused(info: CheckpointInfo) -> None:
    assert chosen(info, host(free=3 * GIB)).kv_cache_tokens < 40_000  # type: ignore[operator]
    small = host(free=900 * MIB, limit="/sys/fs/cgroup/memory.max")
    specs = resolve_models([entry(info.path)], small)
    with pytest.raises(
        ConfigError,
        match=r"memory: the processes .* take .*\(limited by /sys/fs/cgroup/memory.max\), of which 10% are kept",
    ):
        check_memory(specs, small.machine)


def test_several_models_share_the_memory(info: CheckpointInfo) -> None:
    entries = [entry(info.path), entry(info.path), entry(info.path, kv_cache_tokens=16384)]
    machine = host(free=6 * GIB)
    chosen_entries = choose_sizes(entries, [info] * 3, machine)
    assert chosen_entries[0].kv_cache_tokens == chosen_entries[1].kv_cache_tokens
    check_memory(resolve_models(chosen_entries, machine), machine.machine)


@pytest.mark.parametrize(
    ("free", "tp_size"),
    rest_by_night(
        list(product((3, 4, 6, 10, 40), (1, 2, 3))), by_day=[(3, 1), (4, 2), (6, 3), (10, 1), (40, 2)], has_names=True
    ),
)
def test_what_is_chosen_fits(free: int, tp_size: int, info: CheckpointInfo) -> None:
    machine = host(free=free * GIB)
    specs = resolve_models([entry(info.path, tensor_parallel_size=tp_size)], machine)
    check_memory(specs, machine.machine)


def test_length_bounds_the_cache(info: CheckpointInfo) -> None:
    assert chosen(info, host(), max_model_len=128, max_num_seqs=4).kv_cache_tokens == 512


@pytest.mark.parametrize("word", ["auto", None])
def test_auto_can_be_written(word: str | None) -> None:
    data = {"name": "m", "source": "s", "kv_cache_tokens": word, "threads_per_rank": word}
    parsed = parse_config({"models": [data]}, origin="test").models[0]
    assert parsed.kv_cache_tokens is None and parsed.threads_per_rank is None
    assert parsed.device == parsed.dtype == "auto"


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("dtype", "bf16", "did you mean 'bfloat16'?"), ("dtype", "fp16", "did you mean 'float16'?"),
        ("dtype", "half", "did you mean 'float16'?"), ("dtype", "torch.bfloat16", "did you mean 'bfloat16'?"),
        ("dtype", "FLOAT32", "did you mean 'float32'?"), ("device", "gpu", "did you mean 'cuda'?"),
        ("device", "CPU", "did you mean 'cpu'?"), ("quantization", "int-8", "did you mean 'int8'?"),
        ("kv_cache_tokens", "many", "valid integer"), ("threads_per_rank", "-1", "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_a_wrong_value_comes_with_the_one_that_was_meant(field: str, value: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"models": [{"name": "m", "source": "s", field: value}]}, origin="test")
    assert f"models.0.{field}:" in str(caught.value) and hint in str(caught.value)


def with_config(info_path: Path, changes: dict[str, object]) -> CheckpointInfo:
    config = json.loads((info_path / "config.json").read_text())
    config.pop("torch_dtype", None)
    (info_path / "config.json").write_text(json.dumps(config | changes))
    return describe(info_path)


def test_the_dtype_of_a_checkpoint(tmp_path: Path, smollm2_path: Path) -> None:
    directory = twin("7b").write(tmp_path / "hf", "hf")
    assert stored_dtype(describe(directory)) == "float16"
    assert stored_dtype(with_config(directory, {"dtype": "bfloat16"})) == "bfloat16"
    assert stored_dtype(with_config(directory, {"dtype": None, "torch_dtype": "torch.float32"})) == "float32"
    silent = with_config(directory, {"dtype": None, "torch_dtype": None})
    assert stored_dtype(silent) == "float16", "as its largest tensor"
    silent.weight_files[0].write_bytes(struct.pack("<Q", 5) + b"oops!")
    assert stored_dtype(silent) == "bfloat16", "whoever reads the weights tells what is wrong"
    assert stored_dtype(describe(twin("13b").write(tmp_path / "meta", "meta"))) == "bfloat16"
    assert stored_dtype(describe(smollm2_path)) == "bfloat16", "quantised"


def test_float16_has_no_kernels_on_a_cpu(tmp_path: Path) -> None:
    info = describe(twin("7b").write(tmp_path / "hf", "hf"))
    assert chosen(info, host()).dtype == "bfloat16"
    assert chosen(info, host(gpus=1)).dtype == "float16"
    assert chosen(info, host(), dtype="float16").dtype == "float16"


def test_quantised_weights_stay_so_on_a_cpu_alone(smollm2_path: Path, tmp_path: Path) -> None:
    info = describe(smollm2_path)
    assert chosen(info, host()).quantization == "packed"
    assert chosen(info, host(), quantization="none").kept_quantization == ""
    assert chosen(info, host(), quantization="int8").kept_quantization == "int8"
    gpu = chosen(info, host(), device="cuda", kv_cache_tokens=1024)
    assert gpu.quantization == "none", "there it has to be asked for"
    dense = describe(twin("7b").write(tmp_path / "dense", "hf"))
    assert chosen(dense, host()).kept_quantization == ""
    with pytest.raises(
        ConfigError, match=r"quantization is packed, and .*holds no weights that are quantised in groups"
    ):
        chosen(dense, host(), quantization="packed")


def test_a_cache_in_fp8_holds_twice_as_many_tokens(tmp_path: Path) -> None:
    info = describe(twin("7b").write(tmp_path / "hf", "hf"))
    plain = chosen(info, host(gpus=1), dtype="bfloat16")
    small = chosen(info, host(gpus=1), dtype="bfloat16", kv_cache_dtype="fp8")
    assert plain.kv_cache_tokens is not None and small.kv_cache_tokens is not None
    assert small.kv_cache_tokens // 2 - plain.kv_cache_tokens in range(-16, 17)
    (spec,) = resolve_models([small], host(gpus=1))
    assert spec.parallel.kv_cache_dtype == "fp8"
    with pytest.raises(ConfigError, match=r"^models\.m\.kv_cache_dtype is fp8, .*the device is cpu; use auto"):
        chosen(info, host(), kv_cache_dtype="fp8")


def test_fp8_needs_gpus_that_multiply_it(tmp_path: Path) -> None:
    info = describe(twin("7b").write(tmp_path / "hf", "hf"))
    gpu = chosen(info, host(gpus=1), quantization="fp8")
    assert (gpu.device, gpu.kept_quantization) == ("cuda", "fp8")
    for machine, told in (
        (host(), "the device is cpu; use int8"),
        (host(gpus=1, capability=(8, 0)), "which has 8.0; use int8"),
    ):
        with pytest.raises(ConfigError, match=rf"^models\.m\.quantization is fp8, .*{told}"):
            chosen(info, machine, quantization="fp8")
