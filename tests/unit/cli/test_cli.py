"""The command line where it needs no server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from model_parallel.errors import ConfigError
from model_parallel.python_process import module_command
from serving import __version__
from serving.cli.doctor import Level, _checked
from serving.cli.main import _account, _client, app, main
from serving.cli.serve import default_config, first_question, model_config, overridden, served_name
from serving.cli.terminal import width_of
from serving.config import ServingConfig, api_key, load_config, parse_config
from serving.driver.preflight import check_environment
from tests.support.effort import rest_by_night

COMMANDS = ["serve", "demo", "generate", "chat", "models", "fetch", "version", "doctor", "status"]


def test_help_lists_every_command() -> None:
    output = CliRunner().invoke(app, ["--help"]).output
    assert all(command in output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output) > 100


def test_the_version_comes_from_one_place() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"{__version__}\n"
    assert CliRunner().invoke(app, ["version"]).output == f"{__version__}\n"


def test_short_help() -> None:
    assert CliRunner().invoke(app, ["-h"]).exit_code == 0


def test_a_model_is_called_what_its_directory_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--lmsys--vicuna-7b-v1.5" / "snapshots" / "0123abcd"
    for path in (tmp_path / "vicuna-7b-v1.5", tmp_path / "my model (new)", snapshot):
        path.mkdir(parents=True)
    (tmp_path / "tiny-v1.0.Q4_1.gguf").touch()
    (tmp_path / "link").symlink_to(snapshot)
    assert served_name(str(tmp_path / "vicuna-7b-v1.5")) == "vicuna-7b-v1.5"
    assert served_name(f"{tmp_path}/vicuna-7b-v1.5/") == "vicuna-7b-v1.5"
    assert served_name(str(snapshot)) == "lmsys/vicuna-7b-v1.5"
    assert served_name(str(tmp_path / "link")) == "lmsys/vicuna-7b-v1.5"
    assert served_name(str(tmp_path / "my model (new)")) == "my-model-new-"
    assert served_name(str(tmp_path / "tiny-v1.0.Q4_1.gguf")) == "tiny-v1.0.Q4_1"
    monkeypatch.chdir(tmp_path / "vicuna-7b-v1.5")
    assert served_name(".") == "vicuna-7b-v1.5"
    assert served_name("smollm2-135m-instruct") == "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("./no/such", ["--model: ./no/such does not exist"]),
        ("/no/such.gguf", ["/no/such.gguf does not exist"]),
        ("meta-llama/Llama-2-7b-hf", ["hf download meta-llama/Llama-2-7b-hf", "does not download from Hugging Face"]),
        ("smollm2-135m-instrct", ["did you mean 'smollm2-135m-instruct'?"]),
        ("nonsense", ["known models: smollm2-135m-instruct"]),
    ],
)
def test_a_model_that_is_not_there_is_told_as_such(source: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        served_name(source)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("with_file", [True, False])
def test_doctor_checks_what_serve_would_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_file: bool) -> None:
    (tmp_path / "m").mkdir()
    file = tmp_path / "packtrain.yaml"
    file.write_text(f"models: [{{name: a, source: {tmp_path}/other, dtype: float32}}]\n")
    looked_at: list[ServingConfig] = []
    monkeypatch.setattr("serving.cli.doctor.look_at_config", lambda config: looked_at.append(config) or [])
    assert list(_checked(file if with_file else None, str(tmp_path / "m"))) == []
    (entry,) = looked_at[0].models
    assert (entry.source, entry.name) == (str(tmp_path / "m"), "m")
    assert entry.dtype == ("float32" if with_file else "auto")


@pytest.mark.parametrize("file", ["m", "nothing"])
def test_doctor_refuses_what_serve_refuses(tmp_path: Path, file: str) -> None:
    (tmp_path / "m").mkdir()
    (finding,) = _checked(tmp_path / file, str(tmp_path / "m"))
    assert finding.level is Level.PROBLEM
    assert ("give one of the two" if file == "m" else "nothing does not exist") in finding.text


def test_what_no_flag_sets_stays_unset() -> None:
    config = overridden(default_config(), models={"dtype": None}, gateway={"port": 0}, admin={"metrics_port": None})
    assert "metrics_port" not in config.admin.model_fields_set, "so that it may move"
    assert config.gateway.port == 0 and config.models[0].dtype == "bfloat16"
    chosen = overridden(default_config(), admin={"metrics_port": 9464})
    assert "metrics_port" in chosen.admin.model_fields_set


def test_flags_and_yaml_have_the_same_defaults(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    by_flag = model_config(str(tmp_path / "m")).models[0]
    by_yaml = parse_config({"models": [{"name": "m", "source": str(tmp_path / "m")}]}, origin="test").models[0]
    assert by_flag == by_yaml


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("first\nsecond\nthird"),
        KeyError("x"),
        Exception(),
        OSError(28, "No space left on device", "/tmp/x"),
    ],
)
def test_an_unforeseen_error_ends_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr("serving.cli.main.app", broken)
    monkeypatch.setattr(sys, "argv", ["packtrain"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (70, 78)
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.startswith("error: ") and said.count("\n") == 1


def test_ctrl_c_while_modules_are_imported_ends_quietly() -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'serving.cli.main': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from serving.cli.__main__ import main\n"
        "main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def _python(redirection: str, code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that runs `code` with `main` of the command, as if it had been given `arguments`."""
    code = f"import sys\nfrom serving.cli.__main__ import main\n{code}\n"
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-c", code, *arguments]
    variables = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=variables)


@pytest.mark.parametrize(
    "closed",
    rest_by_night(["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"], by_day=[">&-", "2>&-", "<&- >&- 2>&-"]),
)
def test_a_closed_stream_is_no_error(closed: str) -> None:
    code = (
        "sys.argv[1:] = ['--version']\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "sys.argv[1:] = ['models', '--address', '127.0.0.1:9']\n"
        "main()"
    )
    ended = _python(closed, code)
    assert (ended.returncode, ended.stdout) == (1, "" if " >&-" in f" {closed}" else f"{__version__}\n")
    assert ("nothing listens" in ended.stderr) == ("2>&-" not in closed)
    assert ended.stderr.count("\n") == ("2>&-" not in closed)


def test_no_other_file_gets_the_number_of_a_closed_stream() -> None:
    code = (
        "import os, socket, sys\n"
        "from serving.cli.__main__ import _open_closed_streams\n"
        "_open_closed_streams()\n"
        "with socket.socket() as sock: number = sock.fileno()\n"
        "found = [os.readlink(f'/proc/self/fd/{i}') for i in range(3)]\n"
        "ok = number > 2 and found == ['/dev/null'] * 3 and all(map(os.get_inheritable, range(3)))\n"
        "print('lost'); input_is_empty = sys.stdin.read() == ''\n"
        "os._exit(0 if ok and input_is_empty else 3)\n"
    )
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    "encoding",
    rest_by_night(["ascii", "latin-1", "ascii:surrogateescape"], by_day=["latin-1", "ascii:surrogateescape"]),
)
def test_what_the_encoding_of_the_output_lacks_is_escaped(encoding: str, tmp_path: Path) -> None:
    code = "try: main()\nfinally: print('5 €')"
    ended = _python("", code, "inspect", str(tmp_path / "5 € 日本"), PYTHONIOENCODING=encoding)
    assert (ended.returncode, ended.stdout) == (78, "5 \\u20ac\n")
    assert "5 \\u20ac \\u65e5\\u672c does not exist" in ended.stderr


def test_a_character_that_another_encoding_lacks_is_not_laid_to_the_user() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        "5 €".encode("latin-1")
    assert _account(caught.value) == (
        "latin-1, the encoding of the output, has no '€'; set PYTHONIOENCODING=utf-8",
        78,
    )


def test_a_current_directory_that_is_gone_is_told(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(gone), *module_command("serving.cli", "--version")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 78
    assert ended.stderr.startswith("error: the current directory is gone") and ended.stderr.count("\n") == 1


def test_what_is_piped_is_not_cut_and_a_size_of_the_terminal_that_is_no_number_is_ignored(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 150)
    result = _python("", "main()", "serve", "--model", str(long), COLUMNS="²", LINES="²")
    assert result.returncode == 78
    assert result.stderr == f"error: --model: {long} does not exist; give a model's directory or GGUF file\n"


@pytest.mark.parametrize("text", ["lat\udce9in", "half \ud83d"])
def test_text_that_is_not_utf_8_is_called_so(text: str) -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        text.encode()
    assert _account(caught.value) == ("text that was given is not UTF-8, or has half of a character", 78)


@pytest.mark.parametrize(
    ("key", "sent"), [("sk-abc\n", "sk-abc"), ("sk-abc\r\n", "sk-abc"), (" sk-abc ", "sk-abc"), ("\n", ""), ("", "")]
)
def test_a_line_break_after_a_key_is_left_out(key: str, sent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKTRAIN_API_KEY", key)
    assert api_key() == sent


@pytest.mark.parametrize("key", ["sk-a b", "sk-\u00e9", "sk-\x7f", "a\nb"])
def test_a_key_that_no_header_can_carry_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKTRAIN_API_KEY", key)
    with pytest.raises(ConfigError, match=r"^PACKTRAIN_API_KEY holds a space, or a character that is not ASCII"):
        api_key()


@pytest.mark.parametrize(
    ("name", "value"),
    [("PACKTRAIN_LOG_LEVEL", "trace"), ("PACKTRAIN_LOG_FORMAT", "xml"), ("PACKTRAIN_CPU_ISA", "avx1024")],
)
def test_a_wrong_setting_of_the_environment_is_told_before_anything_starts(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_environment()
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"(?i)^{name} is '{value}' and must be "):
        check_environment()


@pytest.mark.parametrize(
    ("columns", "is_terminal", "width"), [("", False, 4096), ("0", False, 4096), ("100", True, None)]
)
def test_output_is_as_wide_as_what_shows_it(
    columns: str, is_terminal: bool, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert width_of(is_terminal) == width


def test_no_columns_at_all_are_taken_for_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    width = width_of(True)
    assert width is not None and width > 0


def test_the_configuration_of_a_checkpoint_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    with pytest.raises(ConfigError, match=f"is the configuration of a checkpoint; give its directory, {tmp_path}"):
        load_config(tmp_path / "config.json")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise RuntimeError("oh")

    monkeypatch.setattr("serving.cli.main.app", broken)
    monkeypatch.setattr(sys, "argv", ["packtrain", "serve", "--debug"])
    with pytest.raises(SystemExit):
        main()
    assert "Traceback" in capsys.readouterr().err
    assert sys.argv == ["packtrain", "serve"]


def test_the_default_is_tensor_parallel() -> None:
    assert default_config().models[0].tensor_parallel_size == 2


def test_a_wrong_configuration_ends_with_status_78_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "packtrain.yaml"
    file.write_text("models: [{name: a, source: b}]\nlimit: {}\n")
    assert _run(monkeypatch, "serve", str(file)) == 78
    said = capsys.readouterr().err
    assert "unknown key 'limit'; did you mean 'limits'?" in said
    assert "Traceback" not in said and said.count("\n") == 1


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The status that the command ends with."""
    monkeypatch.setattr(sys, "argv", ["packtrain", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("meta-llama/Llama-2-7b-hf",), "hf download meta-llama/Llama-2-7b-hf"),
        (("smollm2-135m-instrct",), "did you mean 'smollm2-135m-instruct'?"),
        (("--model", "smollm2-135m-instrct"), "did you mean 'smollm2-135m-instruct'?"),
        (("/no/such",), "/no/such does not exist; give a YAML file, or a model's directory or GGUF file"),
        (("--config", "/no/such.yaml"), "/no/such.yaml: No such file or directory"),
        (("a.yaml", "--config", "b.yaml"), "give one of the two"),
    ],
)
def test_what_is_not_there_to_serve(
    arguments: tuple[str, ...], part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "serve", *arguments) == 78
    said = capsys.readouterr().err
    assert part in said and said.count("\n") == 1


@pytest.mark.parametrize("address", ["127.0.0.1:9,", ",127.0.0.1:9", "127.0.0.1:9, ,"])
def test_a_comma_too_many_between_addresses_is_ignored(address: str) -> None:
    with _client(address, False, None, None, None) as client:
        assert [gateway.address for gateway in client._gateways] == ["127.0.0.1:9"]


@pytest.mark.parametrize("address", ["", ",", " , ", "http://"])
def test_no_address_at_all_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"--address: no address is given; give HOST:PORT"):
        _client(address, False, None, None, None)


def test_no_server_is_said_plainly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, "models", "--address", "127.0.0.1:9") == 1
    assert "nothing listens at 127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize(("names", "named"), [(["a"], ""), (["a", "b"], "--model a ")])
def test_the_command_that_serve_suggests_names_a_model_where_there_are_several(names: list[str], named: str) -> None:
    config = parse_config({"models": [{"name": name, "source": "s"} for name in names]}, origin="test")
    suggested = first_question(config, "127.0.0.1:50051")
    assert suggested == f'packtrain generate --address 127.0.0.1:50051 {named}"What is the capital of France?"'


@pytest.mark.parametrize("command", [["plans", "create"], ["tenants", "create"], ["keys", "create"]])
def test_what_is_made_has_no_value_that_an_option_could_leave_as_it_is(command: list[str]) -> None:
    assert "leaves it as it is" not in " ".join(CliRunner().invoke(app, [*command, "--help"]).output.split())


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["drain", "--group", "g"], "--grace"),
        (["autoscaler", "explain"], "--since"),
        (["keys", "create", "t"], "--expires-in"),
        (["keys", "rotate", "0123456789abcdef"], "--overlap"),
        (["usage"], "--since"),
        (["usage"], "--until"),
    ],
)
def test_a_wrong_time_is_told_with_its_option(command: list[str], option: str, tmp_path: Path) -> None:
    database = [] if command[0] in ("drain", "autoscaler") else ["--database", f"sqlite:///{tmp_path}/tenants.db"]
    result = CliRunner().invoke(app, [*command, option, "5x", *database])
    assert result.exit_code == 2 and f"Invalid value for {option}: a" in " ".join(result.output.split())
    assert "not '5x'" in " ".join(result.output.split())
