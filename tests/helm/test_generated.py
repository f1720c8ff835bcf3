"""Files of the chart that repeat others are up to date: `python helm/generate.py` writes them."""

import importlib.util
import sys
from types import ModuleType

import pytest
import yaml

from serving import __version__
from serving.config import ServingConfig
from tests.support.helm import CHART, ROOT


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chart_generate", ROOT / "helm" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_are_up_to_date(generate: ModuleType) -> None:
    stale = [path.name for path, text in generate.generated().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run `python helm/generate.py`"


def test_every_value_is_documented(generate: ModuleType) -> None:
    documented = {value.path for value in generate.documented_values((CHART / "values.yaml").read_text())}
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def leaves(at: object, path: str) -> set[str]:
        if path in documented or not isinstance(at, dict) or not at:
            return {path}
        return {leaf for key, value in at.items() for leaf in leaves(value, f"{path}.{key}" if path else key)}

    assert sorted(leaves(values, "") - documented) == []


def test_a_new_key_of_the_server_gets_into_the_schema(generate: ModuleType) -> None:
    serving = ServingConfig.model_json_schema()
    serving["$defs"]["ModelEntry"]["properties"]["new_key"] = {"type": "integer"}
    schema = generate.values_schema(yaml.safe_load((CHART / "values.yaml").read_text()), serving)
    assert schema["$defs"]["ModelEntry"]["properties"]["new_key"] == {"type": "integer"}
    assert "tls" not in schema["$defs"]["GatewayConfig"]["properties"]
    assert "RayConfig" not in schema["$defs"]


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    assert f"packtrain:{__version__}" in (ROOT / "compose" / "compose.yaml").read_text()
