import pytest
import ray


def test_a_unit_test_cannot_start_ray() -> None:
    with pytest.raises(RuntimeError, match="tests/integration"):
        ray.init()


def test_nor_by_a_remote_call() -> None:
    with pytest.raises(RuntimeError, match="tests/integration"):
        ray.remote(lambda: None).remote()
