import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from model_parallel.errors import ConfigError
from serving.cli import tenants as cli
from serving.tenants.directory import KeyDirectory
from serving.tenants.store.database import Database
from serving.tenants.store.store import Store
from tests.unit.tenants.test_usage import keep, record

Run = Callable[..., Result]


@pytest.fixture
def run(url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command on the test's database. Fails unless it ends with `status`."""
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    cli.register(app)

    def invoke(*words: str, status: int = 0, database: str = url) -> Result:
        result = CliRunner().invoke(app, [*words, "--database", database])
        if isinstance(result.exception, ConfigError):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    return invoke


def rows(result: Result) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(result.stdout)))


def test_first_keys_are_made_before_any_server_runs(run: Run, url: str) -> None:
    run("plans", "create", "gold", "--tokens-per-minute", "1000", "--weight", "2")
    run("tenants", "create", "acme", "--plan", "gold", "--name", "Acme [bold]", "--priority", "3")
    result = run(
        "keys", "create", "acme", "--label", "web", "--model", "tiny", "--model", "plain", "--expires-in", "90d"
    )
    key = result.stdout.strip()
    assert re.fullmatch(r"pt_[0-9a-f]{16}_[\w-]{43}", key)
    assert key not in result.stderr
    database = Database(url)
    principal = KeyDirectory(Store(database).snapshot()).authenticate([f"Bearer {key}"])
    database.close()
    assert (principal.tenant_id, principal.models, principal.weight) == ("acme", {"tiny", "plain"}, 2.0)
    assert "Acme [bold]" in run("tenants", "list").stdout
    [listed] = rows(run("keys", "list", "--tenant", "acme", "--format", "csv"))
    assert (listed["state"], listed["models"], listed["label"]) == ("live", "tiny plain", "web")
    for command in ("keys", "tenants"):
        assert key not in run(command, "list", "--format", "json").stdout


@pytest.mark.parametrize(
    ("options", "models", "is_admin"),
    [
        ([], "all", "False"),
        (["--admin"], "", "True"),
        (["--admin", "--all-models"], "all", "True"),
        (["--admin", "--model", "a"], "a", "True"),
        (["--model", "a"], "a", "False"),
    ],
)
def test_what_a_key_allows(run: Run, options: list[str], models: str, is_admin: str) -> None:
    run("tenants", "create", "acme")
    run("keys", "create", "acme", *options)
    [listed] = rows(run("keys", "list", "--format", "csv"))
    assert (listed["models"], listed["is_admin"]) == (models, is_admin)


def test_keys_are_rotated_and_revoked(run: Run) -> None:
    run("tenants", "create", "acme")
    run("keys", "create", "acme")
    [first] = rows(run("keys", "list", "--format", "csv"))
    second = run("keys", "rotate", first["id"], "--overlap", "24h").stdout.split("_")[1]
    run("keys", "revoke", first["id"])
    states = {row["id"]: row["state"] for row in rows(run("keys", "list", "--format", "csv"))}
    assert states == {first["id"]: "revoked", second: "live"}
    assert "revoked or expired" in run("keys", "rotate", first["id"], "--overlap", "0s", status=1).stderr


def test_a_whole_key_in_place_of_its_id_is_not_printed(run: Run) -> None:
    run("tenants", "create", "acme")
    key = run("keys", "create", "acme").stdout.strip()
    for command in (["keys", "revoke", key], ["keys", "rotate", key, "--overlap", "0s"], ["usage", "--key", key]):
        said = run(*command, status=1)
        assert f"between the underscores of the key: '{key[3:19]}'" in said.stderr
        assert key[20:] not in said.stderr + said.stdout
    [listed] = rows(run("keys", "list", "--format", "csv"))
    assert listed["state"] == "live"


def test_updates_change_what_is_given_and_none_takes_away(run: Run) -> None:
    run("plans", "create", "gold", "--token-budget", "5")
    run("plans", "update", "gold", "--token-budget", "none", "--priority", "-2")
    run("tenants", "create", "acme", "--plan", "gold", "--weight", "2", "--max-concurrent-requests", "4")
    run("tenants", "update", "acme", "--weight", "none", "--requests-per-minute", "60")
    run("tenants", "disable", "acme")
    [plan, _] = json.loads(run("plans", "list", "--format", "json").stdout)
    assert (plan["name"], plan["token_budget"], plan["priority"]) == ("gold", None, -2)
    [tenant] = json.loads(run("tenants", "show", "acme", "--format", "json").stdout)
    assert (tenant["weight"], tenant["requests_per_minute"], tenant["max_concurrent_requests"]) == (None, 60, 4)
    assert tenant["disabled"]
    run("tenants", "enable", "acme")
    assert json.loads(run("tenants", "show", "acme", "--format", "json").stdout)[0]["disabled"] is None


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["tenants", "create", "Acme"], 1, "id must be 1 to 64 lower-case"),
        (["tenants", "create", "acme", "--plan", "none"], 1, "there is no plan 'none'"),
        (["plans", "create", "unlimited"], 1, "already"),
        (["plans", "create", "a", "--weight", "0"], 1, "weight must be from 0.001"),
        (["plans", "create", "a", "--token-budget", "many"], 2, "must be a number"),
        (["plans", "update", "unlimited"], 2, "at least one option"),
        (["tenants", "show", "nobody"], 1, "there is no tenant 'nobody'"),
        (["keys", "create", "nobody"], 1, "there is no tenant 'nobody'"),
        (["keys", "create", "nobody", "--expires-in", "soon"], 2, "such as 24h"),
        (["keys", "create", "nobody", "--model", "a", "--all-models"], 2, "either --model or --all-models"),
        (["usage", "--since", "yesterday"], 2, "2026-01-31"),
        (["usage", "--since", "1h", "--until", "2h"], 1, "until must be after since"),
    ],
)
def test_what_a_user_can_mend_is_said_in_words(run: Run, words: list[str], status: int, message: str) -> None:
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run(*words, status=status).stderr).split())
    assert message in shown


def test_usage_is_summed_and_exported(run: Run, store: Store) -> None:
    keep(store, [record(index) for index in range(4)])
    sums = rows(run("usage", "--format", "csv"))
    assert [(row["tenant_id"], row["num_requests"], row["num_completion_tokens"]) for row in sums] == [
        ("acme", "2", "2"),
        ("other", "2", "4"),
    ]
    assert json.loads(run("usage", "--tenant", "nobody", "--format", "json").stdout) == []
    [acme] = json.loads(run("usage", "--tenant", "acme", "--format", "json").stdout)
    assert acme["num_prompt_tokens"] == 20
    exported = json.loads(run("usage", "--records", "--format", "json").stdout)
    assert [each["request_id"] for each in exported] == ["r000", "r001", "r002", "r003"]
    late = rows(run("usage", "--records", "--since", "1970-01-01T00:16:41", "--until", "1s", "--format", "csv"))
    assert [each["request_id"] for each in late] == ["r002", "r003"]
    assert "acme" in run("usage").stdout
    table = re.sub(r"\s|│", "", run("usage", "--records").stdout)
    assert "e+0" not in table


def test_the_configuration_names_the_database(run: Run, url: str, tmp_path: Path) -> None:
    path = tmp_path / "packtrain.yaml"
    path.write_text(f"models: [{{name: a, source: a}}]\ntenancy: {{database: '{url}'}}\n")
    app = typer.Typer()
    cli.register(app)
    assert CliRunner().invoke(app, ["tenants", "create", "acme", "--config", str(path)]).exit_code == 0
    run("tenants", "show", "acme")
    path.write_text("models: [{name: a, source: a}]\n")
    result = CliRunner().invoke(app, ["tenants", "list", "--config", str(path)])
    assert "no section `tenancy`" in str(result.exception)


@pytest.mark.parametrize(
    "url", ["postgresql://packtrain:hunter2@host/db", "postgresql://packtrain@host/db?sslpassword=hunter2"]
)
def test_a_password_does_not_belong_on_a_command_line(run: Run, url: str) -> None:
    with pytest.raises(ConfigError, match="process list") as caught:
        run("usage", database=url)
    assert "hunter2" not in str(caught.value)
