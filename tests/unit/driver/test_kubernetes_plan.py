"""Machines, memory and timeouts of a configuration, and what is wrong with values of the chart."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_parallel.errors import ConfigError
from model_parallel.memory import DEVICES, GIB
from serving.config import ServingConfig, parse_config
from serving.driver import kubernetes
from serving.driver.chart_values import merged, with_defaults
from serving.driver.kubernetes import Machine

ROOT = Path(__file__).parents[3]
CHART = ROOT / "helm" / "packtrain"
A100 = DEVICES["a100-80g"]
NODE = Machine(num_gpus=8, gpu=A100)
LLAMA_70B = {
    "name": "chat",
    "source": "/models/Llama-2-70b-chat-hf",
    "device": "cuda",
    "dtype": "bfloat16",
    "tensor_parallel_size": 8,
    "kv_cache_tokens": 1 << 20,
    "max_model_len": 4096,
}


def config(*models: dict[str, Any], **sections: Any) -> ServingConfig:
    return parse_config({"models": list(models), "tenancy": {}, **sections}, origin="test")


def planned(serving: ServingConfig, machine: Machine = NODE, **same_as: str) -> kubernetes.ClusterPlan:
    return kubernetes.plan(serving, machine, kubernetes.model_configs(serving, same_as))


def test_70b_on_eight_gpus_takes_one_machine_a_group() -> None:
    plan = planned(config(LLAMA_70B | {"num_groups": 2}))
    assert plan.problems == ()
    assert (plan.num_replicas, plan.num_hosts) == (2, 1)
    # 70B in bfloat16 is 137.95 GB; a rank's eighth and its one key/value head of 2 * 80 * 128 * 2 bytes a token.
    (model,) = plan.models
    assert max(rank.weight_bytes for rank in model.memory.ranks) / GIB == pytest.approx(16.06, abs=0.01)
    assert {rank.kv_bytes_per_token for rank in model.memory.ranks} == {2 * 80 * 128 * 2}


def test_a_group_that_spans_machines() -> None:
    plan = planned(config(LLAMA_70B | {"tensor_parallel_size": 16, "num_groups": 2}))
    assert (plan.num_replicas, plan.num_hosts) == (2, 2)


def test_small_groups_share_a_machine() -> None:
    small = {"name": "small", "source": "Llama-2-7b-hf", "device": "cuda", "dtype": "bfloat16", "num_groups": 3}
    plan = planned(config(small, LLAMA_70B | {"tensor_parallel_size": 4, "num_groups": 3, "kv_cache_tokens": 65536}))
    assert plan.num_replicas == 2  # 15 GPUs: 4 + 4, and 4 + 1 + 1 + 1


def test_a_cache_that_does_not_fit_is_told_with_its_numbers() -> None:
    (problem,) = planned(config(LLAMA_70B | {"kv_cache_tokens": 2 << 20})).problems
    assert "chat does not fit a100-80g" in problem and "16.06 GiB for weights" in problem and "tokens fit" in problem


@pytest.mark.parametrize(
    ("gpu", "model", "told"),
    [
        ("a100-80g", {}, "models.chat.quantization is fp8, .*a100-80g, which has 8.0; use int8"),
        ("h200", {"device": "cpu"}, "models.chat.quantization is fp8, .*the device is cpu; use int8"),
        ("h200", {}, ""),
        ("a100-80g", {"quantization": "none", "kv_cache_dtype": "fp8"}, "kv_cache_dtype is fp8, .*has 8.0; use auto"),
    ],
)
def test_fp8_on_machines_that_do_not_multiply_it(gpu: str, model: dict[str, str], told: str) -> None:
    problems = planned(
        config(LLAMA_70B | {"quantization": "fp8"} | model), Machine(num_gpus=8, gpu=DEVICES[gpu])
    ).problems
    assert re.search(told, "\n".join(problems)) if told else problems == ()


def test_gpus_must_be_told() -> None:
    (problem,) = planned(config(LLAMA_70B), Machine(num_gpus=0, gpu=None)).problems
    assert "--gpus-per-node" in problem


def test_a_machine_without_enough_memory_or_cpus() -> None:
    serving = config(
        {"name": "m", "source": "llama-2-7b", "dtype": "bfloat16", "tensor_parallel_size": 4, "cpus_per_rank": 2}
    )
    small = Machine(num_gpus=0, gpu=None, num_cpus=4, memory_bytes=8 * GIB)
    cpus, memory = planned(serving, small).problems
    assert "a group needs 0 GPUs and 8 CPUs, and a machine has 0 and 4" in cpus
    assert "a machine has 8 GiB of memory" in memory


def test_a_model_of_which_nothing_is_known() -> None:
    serving = config({"name": "mine", "source": "/models/mine"})
    with pytest.raises(ConfigError, match="--same-as mine=llama-2-7b-chat"):
        kubernetes.model_configs(serving, {})
    assert kubernetes.model_configs(serving, {"mine": "llama-2-13b"})["mine"].num_layers == 40
    with pytest.raises(ConfigError, match="does not serve"):
        kubernetes.model_configs(serving, {"mine": "llama-2-13b", "other": "llama-2-7b"})


def test_values_pass_their_own_check() -> None:
    serving = config(
        LLAMA_70B | {"num_groups": 2}, gateway={"drain_timeout_s": 300, "host": "0.0.0.0"}, admin={"host": "0.0.0.0"}
    )
    made = kubernetes.values(serving, planned(serving), claim="llama", accepts_licence=True)
    assert made["terminationGracePeriodSeconds"] == 345
    assert made["worker"]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert made["weights"] == {"source": "pvc", "pvc": {"existingClaim": "llama"}}
    assert "host" not in made["config"]["gateway"] and "admin" not in made["config"]
    assert kubernetes.check(made, A100, {}).problems == ()


@pytest.mark.parametrize("path", sorted((CHART / "ci").glob("*.yaml")), ids=lambda path: path.name)
def test_the_charts_own_values_can_work(path: Path) -> None:
    verdict = kubernetes.check(yaml.safe_load(path.read_text()), A100, {})
    assert verdict.problems == ()


def test_what_is_left_to_be_chosen_is_planned_as_it_will_be() -> None:
    serving = config({"name": "chat", "source": "llama-2-7b"})
    (on_gpu,) = planned(serving, Machine(num_gpus=1, gpu=A100)).models
    assert (on_gpu.entry.device, on_gpu.cache_tokens) == ("cuda", on_gpu.memory.kv_tokens)
    (on_cpu,) = planned(serving, Machine(num_gpus=0, gpu=None)).models
    assert (on_cpu.entry.device, on_cpu.cache_tokens) == ("cpu", 16384)


def test_a_known_model_is_taken_from_the_image() -> None:
    serving = config({"name": "small", "source": "smollm2-135m-instruct"})
    plan = planned(serving, Machine(num_gpus=0, gpu=None), small="llama-2-7b")
    (entry,) = kubernetes.values(serving, plan, claim=None, accepts_licence=False)["config"]["models"]
    assert entry["source"] == "/opt/packtrain/models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert entry["chat"]["format"] == "chatml"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"terminationGracePeriodSeconds": 60}, "draining needs 75"),
        ({"license": {"accept": False}}, "license.accept is not true"),
        ({"gateway": {"replicas": 2}}, "must be PostgreSQL"),
        ({"config": {"tenancy": None}}, "there are no keys"),
        ({"worker": {"replicas": 3}}, "gpu: replicas is 3, and must be from minReplicas, 2, to maxReplicas, 2"),
        ({"weights": {"source": "none"}}, "source is /models/Llama-2-70b-chat-hf, and weights.source is none"),
        ({"config": {"gateway": {"port": 0}}}, "config.gateway.port is 0"),
        ({"config": {"gateway": {"http_port": 0}}}, "config.gateway.http_port is 0; the ports of pods must be known"),
        ({"config": {"gateway": {"port": 9464}}}, "config.gateway.port and config.admin.metrics_port are both 9464"),
        (
            {"worker": {"resources": {"limits": {"nvidia.com/gpu": 4}}}},
            "the largest worker group has room for 4 ranks of 1 GPU and 1 CPU each",
        ),
        (
            {"worker": {"resources": {"limits": {"cpu": "4"}}}},
            "tensor_parallel_size is 8, and the largest worker group has room for 4 ranks of 1 GPU and 1 CPU each",
        ),
        (
            {"worker": {"resources": {"requests": {"cpu": None}, "limits": {"cpu": None}}}},
            "the largest worker group has room for 0 ranks",
        ),
        ({"worker": {"replicas": 1, "minReplicas": 1}}, "num_groups is 2, and the worker groups have room for 1"),
        ({"worker": {"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB"}}}, "does not fit a100-40g"),
    ],
)
def test_what_is_wrong_is_told(change: dict[str, Any], words: str) -> None:
    serving = config(LLAMA_70B | {"num_groups": 2})
    good = kubernetes.values(serving, planned(serving), claim="llama", accepts_licence=True)
    problems = kubernetes.check(merged(good, change), A100, {}).problems
    assert [problem for problem in problems if words in problem], problems


def test_groups_that_autoscaling_may_start_have_places() -> None:
    """The check counted num_groups alone, and the chart refused the same values."""
    serving = config(LLAMA_70B | {"num_groups": 2, "autoscaling": {"max_groups": 3}})
    made = kubernetes.values(serving, planned(serving), claim="llama", accepts_licence=True)
    assert made["worker"]["replicas"] == 3
    assert kubernetes.check(made, A100, {}).problems == ()
    (problem,) = kubernetes.check(merged(made, {"worker": {"replicas": 2, "minReplicas": 2}}), A100, {}).problems
    assert problem == (
        "chat: autoscaling.max_groups is 3, and the worker groups have room for 2 of 8 ranks of 1 GPU and 1 CPU each"
    )


def test_the_request_counts_where_cpus_have_no_limit() -> None:
    serving = config(LLAMA_70B)
    made = kubernetes.values(serving, planned(serving), claim="llama", accepts_licence=True)
    verdict = kubernetes.check(
        merged(made, {"worker": {"resources": {"limits": {"cpu": None, "memory": None}}}}), A100, {}
    )
    assert verdict.problems == ()
    assert verdict.lines[0] == "gpu: 1 machines with 8 GPUs, 64 CPUs, no limit of memory"


def test_models_that_have_places_each_and_not_together() -> None:
    small = {"name": "small", "source": "/opt/x", "device": "cpu"}
    verdict = kubernetes.check({"config": {"models": [small, small | {"name": "other", "cpus_per_rank": 2}]}}, None, {})
    assert verdict.problems == ("all groups together need 3 CPUs and the cluster has 2 in total",)


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        (
            {"requests": {"cpu": 64}},
            "workers: resources.requests.cpu is 64 and limits.cpu is 2; Kubernetes wants at least as much, or null there",
        ),
        (
            {"requests": {"memory": "16384Mi"}, "limits": {"memory": "8Gi"}},
            "requests.memory is 16384Mi and limits.memory is 8Gi",
        ),
        ({"requests": {"nvidia.com/gpu": 8}}, "requests.nvidia.com/gpu is 8 and limits.nvidia.com/gpu is missing"),
        ({"requests": {"cpu": "1500m"}, "limits": {"cpu": 1.5}}, None),
        ({"requests": {"cpu": 64}, "limits": {"cpu": None}}, None),
    ],
)
def test_requests_that_kubernetes_does_not_take(resources: dict[str, Any], words: str | None) -> None:
    values = {
        "config": {"models": [{"name": "m", "source": "/opt/x", "device": "cpu"}]},
        "worker": {"resources": resources},
    }
    problems = kubernetes.check(values, None, {}).problems
    assert bool(problems) == (words is not None)
    assert words is None or words in problems[0]


def test_a_group_replaces_what_it_gives() -> None:
    gpus = {"resources": {"limits": {"cpu": 64, "nvidia.com/gpu": 8}}, "nodeSelector": {"gpu": "a100"}}
    own = {"resources": {"limits": {"cpu": "4"}}, "nodeSelector": {}}
    first, cpu, more = kubernetes.worker_groups(
        with_defaults({"worker": gpus, "additionalWorkerGroups": {"cpu": own, "more": {}}})
    )
    assert (cpu["groupName"], cpu["resources"], cpu["nodeSelector"]) == ("cpu", own["resources"], {})
    assert more == first | {"groupName": "more"}


def test_a_memory_limit_below_what_ranks_need() -> None:
    values = {
        "config": {"models": [{"name": "m", "source": "llama-2-7b", "tensor_parallel_size": 2, "dtype": "bfloat16"}]},
        "license": {"accept": True},
        "worker": {"resources": {"limits": {"cpu": "2", "memory": "16Gi"}}},
    }
    (problem,) = kubernetes.check(values, None, {}).problems
    assert "whose memory limit is 16.0 GiB" in problem


def test_what_is_the_charts_to_set_is_refused() -> None:
    values = {"config": {"models": [{"name": "m", "source": "llama-2-7b"}], "ray": {"address": "auto"}}}
    with pytest.raises(ConfigError, match=r"config\.ray is the chart's to set"):
        kubernetes.check(values, None, {})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(
            ("8", 8),
            ("500m", 0.5),
            ("1.5Gi", 1.5 * GIB),
            ("2k", 2000),
            (".5", 0.5),
            ("5.", 5),
            ("+1", 1),
            ("1e3", 1000),
        ),
        *(("1E", 1e18), ("1E3", 1000), ("500u", 0.0005), ("1Pi", 2.0**50), ("1n", 1e-9), ("1e-3", 0.001)),
    ],
)
def test_quantities(text: str, number: float) -> None:
    assert kubernetes.quantity(text) == number


def test_a_quantity_that_is_none() -> None:
    with pytest.raises(ConfigError, match="is not a quantity"):
        kubernetes.quantity("8 GB")


def test_models_that_share_max_ranks() -> None:
    """Each may have all four GPUs; eight were asked for."""
    scaled = {"source": "llama-2-7b", "device": "cuda", "dtype": "bfloat16", "autoscaling": {"max_groups": 4}}
    models = (scaled | {"name": "a"}, scaled | {"name": "b"})
    plan = planned(config(*models, autoscaler={"max_ranks": 4}), Machine(num_gpus=4, gpu=A100))
    assert (plan.num_replicas, plan.problems) == (1, ())
    assert planned(config(*models), Machine(num_gpus=4, gpu=A100)).num_replicas == 2
    made = kubernetes.values(config(*models, autoscaler={"max_ranks": 4}), plan, claim=None, accepts_licence=True)
    assert kubernetes.check(made, A100, {}).problems == ()
    (problem,) = kubernetes.check(merged(made, {"config": {"autoscaler": {"max_ranks": 5}}}), A100, {}).problems
    assert "all groups together need 5 GPUs" in problem


def test_every_way_in_which_models_may_grow_has_room() -> None:
    """Either one of eight ranks grows, or four of one rank do."""
    large = {"name": "large", "source": "llama-2-7b", "device": "cuda", "tensor_parallel_size": 4}
    small = {"name": "small", "source": "llama-2-7b", "device": "cuda"}
    serving = config(
        large | {"autoscaling": {"max_groups": 2}},
        small | {"autoscaling": {"max_groups": 9}},
        autoscaler={"max_ranks": 9},
    )
    mixes = [dict(mix) for mix in kubernetes._mixes(serving.models, 9)]
    assert mixes == [{"large": 2, "small": 1}, {"large": 1, "small": 5}]
    assert [dict(mix) for mix in kubernetes._mixes(serving.models, None)] == [{"large": 2, "small": 9}]


def test_what_the_chart_sets_is_mapped_to_it(tmp_path: Path) -> None:
    serving = config(
        LLAMA_70B,
        gateway={"http_port": None, "host": "::", "tls": {"certificate": "/c", "private_key": "/k", "client_ca": "/a"}},
        admin={"port": None, "metrics_port": None, "host": "127.0.0.1"},
        tenancy={"database": "postgresql://packtrain:hunter2@db:6432/packtrain?sslmode=require"},
        ray={"address": "auto", "num_gateways": 3, "wait_for_nodes_s": 90.5, "detached": True},
    )
    plan = planned(serving)

    def made(**secrets: str) -> dict[str, Any]:
        return kubernetes.values(serving, plan, claim="llama", accepts_licence=True, **secrets)

    with pytest.raises(ConfigError, match="--tls-secret"):
        made(database_secret="db")
    with pytest.raises(ConfigError, match="--database-secret"):
        made(tls_secret="tls")
    values = made(database_secret="db", tls_secret="tls")
    assert "hunter2" not in str(values)
    assert values["config"]["gateway"] == {"http_port": False, "host": "::"}
    assert values["config"]["admin"] == {"port": False, "metrics_port": False}
    assert values["config"]["tenancy"] == {"database": "postgresql://packtrain@db:6432/packtrain?sslmode=require"}
    assert values["database"] == {"passwordSecret": {"name": "db"}}
    assert values["tls"] == {"existingSecret": "tls", "requireClientCertificate": True}
    assert (values["gateway"], values["driver"]) == ({"replicas": 3}, {"waitForNodesSeconds": 91})
    assert kubernetes.check(values, A100, {}).problems == ()


def test_a_passphrase_that_the_chart_cannot_give_is_refused_and_not_shown() -> None:
    serving = config(LLAMA_70B, tenancy={"database": "postgresql://u@db/x?sslpassword=hunter2"})
    with pytest.raises(ConfigError, match=r"tenancy\.database has sslpassword in it") as caught:
        kubernetes.values(serving, planned(serving), claim="llama", accepts_licence=True, database_secret="db")
    assert "hunter2" not in str(caught.value)


def test_a_file_of_this_machine_is_not_in_the_pods() -> None:
    serving = config(LLAMA_70B, gateway={"resume_key_file": "/etc/key"})
    with pytest.raises(ConfigError, match="resume_key_file is /etc/key, and no file of this machine is in the pods"):
        kubernetes.values(serving, planned(serving), claim="llama", accepts_licence=True)


@pytest.mark.usefixtures("smollm2_path")
def test_all_known_models_are_taken_from_the_image() -> None:
    serving = config({"name": "small", "source": "smollm2-135m-instruct", "draft_model": "smollm2-135m-instruct"})
    plan = planned(serving, Machine(num_gpus=0, gpu=None))
    (entry,) = kubernetes.values(serving, plan, claim=None, accepts_licence=False)["config"]["models"]
    assert entry["draft_model"] == entry["source"]
    assert entry["source"].startswith("/opt/packtrain/models/smollm2-135m-instruct/")


@pytest.mark.parametrize("insecure", [False, True])
def test_without_tenancy_the_chart_keeps_keys_unless_the_configuration_is_insecure(insecure: bool) -> None:
    serving = parse_config(
        {"models": [{"name": "m", "source": "llama-3"}], "gateway": {"insecure": insecure}}, origin="test"
    )
    plan = planned(serving, Machine(num_gpus=0, gpu=None), m="llama-2-7b")
    made = kubernetes.values(serving, plan, claim=None, accepts_licence=False)
    assert ("tenancy" in made["config"], made.get("insecure", False)) == (insecure, insecure)
    assert kubernetes.check(made, None, {"m": "llama-2-7b"}).problems == ()
    assert any("requests need one" in line for line in kubernetes.explained(serving, plan)) != insecure


@pytest.mark.parametrize(
    ("name", "is_llama"),
    [
        *((name, True) for name in ("llama-2-7b", "Llama2", "llama_2.gguf", "x/Llama 2", "llama-2.", "llama-2-200m")),
        *((name, False) for name in ("llama-200m", "tinyllama-2.5T", "llama-20b", "llama-3-2", "tinyllama-1.1b-2.5T")),
    ],
)
def test_names_of_llama_2(name: str, is_llama: bool) -> None:
    assert bool(kubernetes._LLAMA_2.search(name)) == is_llama


def test_the_image_and_the_volume_are_directories_and_no_prefixes() -> None:
    values = {"config": {"models": [{"name": "m", "source": "/models-local/x", "device": "cpu"}]}}
    verdict = kubernetes.check(values, None, {})
    assert verdict.problems == ()
    assert "m: source, /models-local/x, must be in the pods" in verdict.lines
