import importlib
import re
import shlex
import subprocess
import sys

import pytest

from nnunetv2_dermomamba import __version__
from nnunetv2_dermomamba.cli import COMMANDS, main


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text and summary in text for name, (_, summary) in COMMANDS.items())


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_a_reader_that_has_enough_is_no_error():
    command = [sys.executable, "-m", "nnunetv2_dermomamba.cli", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.wait(timeout=120) == 141
        assert "Broken" not in process.stderr.read()


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["evaluate"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_gives_defaults_and_examples_in_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    options, examples = text.split("\noptions:\n")[1].split("\nexamples:\n")
    assert 2 <= examples.count(f"dermomamba {command}") <= 3
    entries = re.split(r"\n(?=  -)", options)
    required = {"predict": ("-i", "-o", "-m"), "evaluate": ("-p", "-g")}.get(command, ())
    for entry in entries[1:]:  # the first is --help
        assert ("(default:" in " ".join(entry.split())) == (entry.split()[0] not in required), entry
    assert "None" not in options
    assert "False" not in options


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_parse(command, monkeypatch):
    module = importlib.import_module(COMMANDS[command][0])
    monkeypatch.setattr(module, "run", lambda args: 0)
    for line in module.EXAMPLES.splitlines()[1:]:
        assert main(shlex.split(line.split(" > ")[0])[1:]) == 0


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from nnunetv2_dermomamba.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'scipy', 'pandas', 'nnunetv2'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_evaluate_imports_no_torch():
    code = (
        "import sys; import nnunetv2_dermomamba.evaluation.evaluate, nnunetv2_dermomamba.evaluation.output\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
