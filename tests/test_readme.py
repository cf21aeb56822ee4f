"""The README says what is true: its commands parse, its files, fields and variants exist."""

import ast
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from salcl_jax import config as lib
from salcl_jax.validation import validate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line.strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if "salcl_jax.main" in line
]


def load(name: str) -> lib.ConfigDict:
    path, _, variant = name.partition(":")
    spec = importlib.util.spec_from_file_location("config_file", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def value_of(text: str):
    try:
        return ast.literal_eval(text.strip('"'))
    except (ValueError, SyntaxError):
        return text.strip('"')


def test_there_are_commands():
    assert len(COMMANDS) >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_a_valid_configuration(command):
    options = dict(re.findall(r"--(\S+?)=(\"[^\"]*\"|\S+)", command))
    assert options.pop("workdir")
    c = load(options.pop("config")).lock()
    names = [name.removeprefix("config.") for name in options]
    c.update_from_flattened_dict(dict(zip(names, map(value_of, options.values()), strict=True)))
    validate(c)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:configs|launch|salcl_jax)/[\w/.]+)", README))))
def test_files_that_the_readme_names_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("row", re.findall(r"^\| `(configs/\S+)` \| (.*) \|$", README, flags=re.M))
def test_variants_that_the_readme_names_exist(row):
    path, text = row
    for variant in re.findall(r"`(\w+)`", text.partition("variants")[2]):
        load(f"{path}:{variant}")


def test_choices_that_the_readme_names_are_fields():
    table = README.partition("## The method's choices")[2].partition("## ")[0]
    for field in re.findall(r"^\| [^|]+ \| `([\w.]+)`", table, flags=re.M):
        section = lib.base()
        for part in field.split("."):
            section = section[part]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_demo_runs_the_scenes_in_the_given_folder():
    made = subprocess.run(
        ["make", "-n", "demo", "WORKDIR=elsewhere"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "-m salcl_jax.main --config=configs/scenes.py --workdir=elsewhere" in made.stdout
