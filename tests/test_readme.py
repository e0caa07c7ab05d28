"""What the README shows exists: files, commands and flags. Words that drift from the code fail here."""

import ast
import importlib
import operator
import re
import sys
from pathlib import Path

import pytest

from longlora_jax.config import Config

README = Path("README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python (?:-m )?[\w./]+(?: [^`|\n]*)?", README)))


def test_paths_exist():
    """Every config, picture and target that the README names."""
    for path in re.findall(r"configs/\w+\.py|docs/[\w.]+|benchmarks/\w+\.(?:py|json)", README):
        assert Path(path).exists(), path
    makefile = Path("Makefile").read_text()
    for target in re.findall(r"make (\w+)  ", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_file_of_the_package_is_in_the_tree():
    """The file tree with a line each is complete."""
    for path in Path("longlora_jax").glob("*.py"):
        assert path.name == "__init__.py" or path.name in README, path


def test_defaults_of_fields_are_the_codes():
    """Catches: a default in docs/data.md that the code has no more."""
    section = Path("docs/data.md").read_text().partition("## Other fields of a config")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.M)
    assert len(rows) > 9
    for names, values in rows:
        for name, value in zip(re.findall(r"`([\w.]+)`", names), values.split(", "), strict=True):
            default = operator.attrgetter(name)(Config(seq_len=1, steps=1))
            assert type(default)(ast.literal_eval(value) if value != "constant" else value) == default, name


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_know_their_flags(command, monkeypatch, capsys):
    """Each flag that a command of the README uses is in that command's --help."""
    words = command.split()
    program = words[1:3] if words[1] == "-m" else words[1:2]
    used = set(re.findall(r"--([a-z_]+)(?=[ =`]|$)", command))
    if program == ["train.py"]:  # absl lists the fields of a config only when it is given one
        assert used <= {"config", "workdir"}, used
        return
    subcommand = [words[2]] if program == ["convert_weights.py"] else []
    name = program[-1].removesuffix(".py")
    if Path(*name.split("."), "__main__.py").exists():
        name += ".__main__"
    monkeypatch.setattr(sys, "argv", [name, *subcommand, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    for flag in used:
        assert f"--{flag}" in shown.out, f"{command}: {flag}"
