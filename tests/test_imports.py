"""Who may import whom: the layers of the package, read from its source."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "salcl_jax"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
MATHS = {"jax", "numpy", "jaxtyping"}
PURE = ("losses.py", "ema.py", "rng.py", "types.py", "metrics.py")
UPPER = {  # programs: nothing below knows them
    "train", "loop", "main", "evaluate", "bench", "compile", "study", "saliency", "api", "export",
    "notebook",
}
# Who reads or checks fields by name, and who defines them.
CONFIG = {
    "main.py", "evaluate.py", "compile.py", "study.py", "study_plan.py", "api.py", "aot.py", "cli.py",
    "train.py", "validation.py", "config.py", "config_record.py",
}  # fmt: skip
PROGRAMS = [
    "main.py", "evaluate.py", "compile.py", "study.py", "saliency.py", "export.py", "bench/__main__.py",
]  # fmt: skip
LATE = {"sklearn", "scipy", "joblib", "matplotlib", "safetensors", "wandb", "mlflow", "IPython"}
FIELDS = {"config.py", "config_source.py", "config_tasks.py"}


def imports(file: str, late: bool = True) -> set[str]:
    """Dotted names a file imports; without `late` only those that importing the file itself needs."""
    tree = ast.parse((PACKAGE / file).read_text())
    found = set()
    for node in ast.walk(tree) if late else _at_once(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _at_once(node: ast.AST):
    """Nodes outside functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from _at_once(child)


def outside(file: str, late: bool = True) -> set[str]:
    """Top packages beyond the standard library and this one."""
    return {name.split(".")[0] for name in imports(file, late)} - set(sys.stdlib_module_names) - {"salcl_jax"}


def inside(file: str, late: bool = True) -> set[str]:
    """Modules of the package that a file imports, as 'ops.boxes'."""
    known = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in FILES}
    found = set()
    for name in imports(file, late):
        if name.startswith("salcl_jax."):
            parts = name.split(".")[1:]
            ends = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            found.add(next((end for end in ends if end in known), parts[0]))
    return found


def below(folder: str) -> list[str]:
    return [file for file in FILES if file.startswith(f"{folder}/")]


def test_the_reader_sees_late_imports_and_packages():
    assert "optax" in outside("optim.py") and "salcl_jax.types.PyTree" in imports("optim.py")
    assert "ops.boxes" in inside("ops/crop.py")
    late = {file for file in FILES if outside(file) != outside(file, late=False)}
    assert "data/files.py" in late


@pytest.mark.parametrize("file", [*PURE, *below("ops")])
def test_maths_imports_jax_and_numpy_only(file):
    assert outside(file) <= MATHS
    allowed = {"types", "losses", "ema", "rng", "metrics"} if file in PURE else {"types"}
    assert all(module in allowed or module.split(".")[0] == "ops" for module in inside(file))


@pytest.mark.parametrize("file", ["optim.py", *below("models")])
def test_models_and_optim_add_flax_and_optax(file):
    assert outside(file) <= MATHS | {"flax", "optax"}
    assert all(m in ("types", "losses") or m.startswith(("ops", "models")) for m in inside(file))


@pytest.mark.parametrize("file", below("data"))
def test_data_knows_no_jax_and_imports_tensorflow_late(file):
    assert not outside(file) & {"jax", "jaxlib", "flax", "optax", "orbax", "ml_collections"}
    assert all(module.startswith("data") for module in inside(file))
    if file != "data/scenes_tfds.py":  # a module of its own, itself imported late
        assert not outside(file, late=False) & {"tensorflow", "tensorflow_datasets"}


@pytest.mark.parametrize(
    "package, allowed",
    [
        (("tensorflow", "tensorflow_datasets"), below("data")),
        (("orbax",), ["checkpoint.py"]),
        (("tensorboardX", "tensorboard", "clu"), ["board.py"]),
        (("ml_collections",), [*FIELDS, *PROGRAMS]),
        (("absl",), [*PROGRAMS, "cli.py", "data/scenes_tfds.py"]),
        (("sklearn", "joblib"), ["evaluators/voc_svm.py"]),
        (("matplotlib",), ["report_figures.py"]),
        (("tqdm",), ["progress.py"]),
        (("IPython",), ["notebook.py"]),
        (("wandb",), ["wandb_run.py"]),
        (("mlflow", "sqlalchemy", "alembic"), ["mlflow_run.py"]),
        (("torch",), [f for f in below("bench") if f.startswith("bench/torch_")] + ["weights/files.py"]),
        (("safetensors",), ["weights/files.py"]),
        (("transformers", "timm", "torchvision"), []),
    ],
)
def test_a_package_has_its_place(package, allowed):
    users = {file for file in FILES if outside(file) & set(package)}
    assert users <= set(allowed)


@pytest.mark.parametrize("file", [*PROGRAMS, "cli.py", "config.py", "train.py"])
def test_nothing_slow_is_loaded_before_a_wrong_configuration_is_refused(file):
    slow = {"tensorflow", "tensorflow_datasets"} | ({"jax", "flax", "orbax"} if file != "train.py" else set())
    assert not outside(file, late=False) & slow


@pytest.mark.parametrize("file", FILES)
def test_packages_for_a_few_uses_are_imported_late(file):
    assert not outside(file, late=False) & LATE
    assert "torch" not in outside(file, late=False) or file.startswith("bench/torch_")


@pytest.mark.parametrize("file", [f for f in FILES if f not in CONFIG and f not in below("bench")])
def test_the_configuration_is_handed_down_not_imported(file):
    assert "config" not in inside(file)


@pytest.mark.parametrize("file", [f for f in FILES if f.split("/")[0].removesuffix(".py") not in UPPER])
def test_nothing_imports_the_programs_above_it(file):
    assert not inside(file) & UPPER - ({"api"} if file == "__init__.py" else set())


@pytest.mark.parametrize("file", ["weights/names.py", "weights/card.py", "weights/targets.py"])
def test_names_of_weights_are_plain_data(file):
    assert outside(file) <= {"numpy"}
    assert all(m == "types" or m.startswith(("ops", "models", "weights")) for m in inside(file))


@pytest.mark.parametrize("file", ["guidance.py", "train_step.py"])
def test_the_step_knows_no_data_files_or_processes(file):
    lower = {"types", "ema", "losses", "metrics", "optim", "rng", "guidance"}
    assert outside(file) <= MATHS | {"flax", "optax"}
    assert all(m in lower or m.startswith(("ops", "models", "maps")) for m in inside(file))


@pytest.mark.parametrize("file", below("maps"))
def test_sources_of_maps_know_networks_and_mathematics(file):
    assert outside(file, late=False) <= (MATHS if file != "maps/__init__.py" else set())
    assert all(m in ("types", "losses") or m.startswith(("ops", "models")) for m in inside(file))


@pytest.mark.parametrize("file", [f for f in below("evaluators") if f != "evaluators/online.py"])
def test_evaluators_get_features_not_networks(file):
    assert outside(file) <= MATHS | {"flax", "optax"} | ({"sklearn", "joblib"} if "svm" in file else set())
    assert all(m in ("types", "losses") or m.startswith(("ops", "evaluators")) for m in inside(file))


def test_only_the_run_itself_uses_the_online_evaluation():
    users = {file for file in FILES if "evaluators.online" in inside(file)}
    assert users <= {"loop.py", "panels.py"}


def test_no_two_modules_need_each_other_to_be_imported():
    graph = {file.removesuffix(".py").replace("/", "."): inside(file, late=False) for file in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        for other in graph.get(module, ()) if module not in done else ():
            visit(other, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_configs_import_the_config_module_only():
    for path in sorted((ROOT / "configs").glob("*.py")):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        assert found <= {"salcl_jax.config", "importlib.util", "pathlib.Path", "os"}, path
