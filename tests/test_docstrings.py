"""Examples in docstrings do what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "salcl_jax"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if ">>>" in path.read_text())


def test_there_are_examples():
    assert len(FILES) >= 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_examples_of_a_module(path):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    # Decorated by the check of shapes, a function no longer counts as the module's own: ask for it by name.
    found = [
        test
        for attribute, value in vars(module).items()
        if getattr(value, "__module__", "") == name and ">>>" in (value.__doc__ or "")
        for test in finder.find(value, f"{name}.{attribute}", module=False, globs=vars(module).copy())
    ]
    assert sum(len(test.examples) for test in found) == path.read_text().count(">>> ")
    for test in found:
        lines = []
        failed, tried = doctest.DocTestRunner(verbose=False).run(test, out=lines.append)
        assert tried and not failed, "".join(lines)
