"""Arrows of import point one way: scripts to engine, models and data modules, and nothing back."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("engine", "stateful", "comparison", "evaluation", "script", "models", "data_modules", "launch")
PARTS_OF_TRAIN = ("engine", "stateful", "comparison", "evaluation")
ALLOWED = {
    "script": {"engine", "stateful", "comparison", "evaluation", "models", "data_modules"},
    "stateful": {"stateful", "engine", "models"},
    "comparison": {"comparison", "engine"},
    "evaluation": {"evaluation", "stateful", "engine", "models", "data_modules"},
    "engine": {"engine"},
    "models": {"models"},
    "data_modules": {"data_modules"},
    "launch": {"launch"},
}


def part_of(module):
    """Return which part of the house a dotted module name belongs to, None for libraries."""
    top, *rest = module.split(".")
    if top == "train":
        return rest[0] if rest and rest[0] in PARTS_OF_TRAIN else "script"
    return top if top in ALLOWED else None


def imported_modules(path, package):
    """Yield (line, module) for every import of a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            # One leading dot is the package itself, each further one a step up.
            up = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            for name in node.names:
                # "from train import engine" imports a module, "from train.engine.cli import f" a name: of both, the
                # longer path tells the part, and a name in a module is in the same part as the module.
                yield node.lineno, f"{base}.{name.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield node.lineno, argument.value


def wrong_arrows(root):
    """Return 'file:line imports module' for every import in the house under `root` that the design forbids."""
    wrong = []
    for folder in ("train", "models", "data_modules", "launch"):
        for path in sorted((root / folder).rglob("*.py")):
            *package, _ = path.relative_to(root).parts
            part = part_of(".".join([*package, path.stem]))
            for line, module in imported_modules(path, package):
                target = part_of(module)
                if target is not None and target not in ALLOWED[part]:
                    wrong.append(f"{path.relative_to(root).as_posix()}:{line} imports {module}")
    return wrong


def test_the_house_has_no_wrong_arrow():
    assert wrong_arrows(ROOT) == []


def test_the_checker_sees_all_parts_of_the_house():
    seen = {
        part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for folder in ("train", "models", "data_modules", "launch")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert seen == set(PARTS)


FILES = {
    "engine": "train/engine/loop.py",
    "stateful": "train/stateful/loop.py",
    "comparison": "train/comparison/report.py",
    "evaluation": "train/evaluation/results.py",
    "script": "train/classify.py",
    "models": "models/cnn.py",
    "data_modules": "data_modules/images.py",
    "launch": "launch/start.py",
}
TARGETS = {
    "engine": "train.engine.cli",
    "stateful": "train.stateful.eager",
    "comparison": "train.comparison.run",
    "evaluation": "train.evaluation.trained_run",
    "script": "train.reconstruct",
    "models": "models.mlp",
    "data_modules": "data_modules.sampler",
    "launch": "launch.nodes",
}


def check(root, part, code):
    path = root / FILES[part]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    return wrong_arrows(root)


@pytest.mark.parametrize("target", PARTS)
@pytest.mark.parametrize("part", PARTS)
def test_each_arrow_is_allowed_or_caught(tmp_path, part, target):
    found = check(tmp_path, part, f"import torch\nimport {TARGETS[target]}\n")
    allowed = target in ALLOWED[part]
    assert found == ([] if allowed else [f"{FILES[part]}:2 imports {TARGETS[target]}"])


@pytest.mark.parametrize(
    "code",
    [
        "import models",
        "import os, models.cnn as network",
        "from models import cnn",
        "from models.cnn import SimpleCNN",
        "def build():\n    from models.cnn import SimpleCNN",
        "if TYPE_CHECKING:\n    from models.cnn import SimpleCNN",
        "try:\n    import models\nexcept ImportError:\n    models = None",
        "importlib.import_module('models.cnn')",
        "__import__('models')",
        "import train.classify",
        "from train import classify",
        "from train.classify import main",
        "from .. import classify",
        "from ..classify import main",
    ],
)
def test_every_way_to_write_a_wrong_import_of_the_engine_is_caught(tmp_path, code):
    (found,) = check(tmp_path, "engine", code)
    assert found.startswith("train/engine/loop.py:")


@pytest.mark.parametrize(
    "code",
    ["from . import cli", "from .cli import run_script", "from ..engine import cli", "from train.engine import cli"],
)
def test_every_way_to_write_a_right_import_of_the_engine_passes(tmp_path, code):
    assert check(tmp_path, "engine", f"import modelsmith\n{code}\n") == []


def test_a_script_may_not_import_a_script_by_a_relative_path(tmp_path):
    assert check(tmp_path, "script", "from . import reconstruct") == ["train/classify.py:1 imports train.reconstruct"]
    assert check(tmp_path, "script", "from .engine import cli") == []
