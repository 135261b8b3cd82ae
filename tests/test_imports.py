"""Imports inside the package go down the layers, never up."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fastprune"

# From the top down. A module belongs to the entry with the longest matching name; modules of one
# layer may import each other. `ops.native` is the Python side of the operators (it registers and
# describes the libraries), so it stands with `ops`; the libraries themselves import nothing.
LAYERS = [
    ["cli", "__main__"],
    [""],  # fastprune/__init__.py only re-exports
    ["train", "reporting"],
    ["methods"],
    ["deploy"],
    ["optim"],
    ["channels", "masks", "progress", "schedules", "structure", "tickets"],
    ["ops"],
    ["ops.reference", "ops.triton_kernels", "_host"],
]
HEIGHT = {name: len(LAYERS) - position for position, names in enumerate(LAYERS) for name in names}


def height(module: str) -> int:
    """The layer of a module, named without the leading `fastprune.`; higher imports lower."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in HEIGHT:
            return HEIGHT[name]
    raise LookupError(f"fastprune.{module} has no layer: add it to LAYERS in {Path(__file__).name}")


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, package: Path, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and target of each import of the package's own modules, wherever it stands."""
    here = module_name(path, package).split(".") if path.parent != package else []
    if path.parent != package and path.name != "__init__.py":
        here = here[:-1]  # a relative import starts at the folder
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            targets = [".".join(name[1:]) for name in names if name[0] == package.name]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [package.name, *here[: len(here) - node.level + 1], *base]
            if base[:1] != [package.name]:
                continue
            # `from .ops import native` takes a module, `from .ops import build_info` a name in one.
            inner = [".".join([*base[1:], alias.name]) for alias in node.names]
            targets = [name if name in modules else ".".join(base[1:]) for name in inner]
        else:
            continue
        yield from ((node.lineno, target) for target in targets)


def upward_imports(package: Path) -> list[str]:
    paths = sorted(package.rglob("*.py"))
    modules = {module_name(path, package) for path in paths}
    return [
        f"{path.relative_to(package.parent)}:{line} imports {target or package.name}"
        for path in paths
        for line, target in imported_modules(path, package, modules)
        if height(target) > height(module_name(path, package))
    ]


def test_imports_go_down() -> None:
    assert upward_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("path", "line", "target"),
    [
        ("ops/select.py", "from ..optim import GSM", "optim"),
        ("ops/select.py", "from .. import optim", "optim"),
        ("ops/select.py", "import fastprune.cli", "cli"),
        ("ops/select.py", "from fastprune import train", "train"),
        ("ops/__init__.py", "from ..masks import MaskSet", "masks"),
        ("ops/reference/select.py", "from ..native import build_info", "ops.native"),
        ("masks.py", "def f():\n    from .optim.gsm import GSM", "optim.gsm"),
        ("optim/gsm.py", "from fastprune import prospr", "fastprune"),
        ("train/__init__.py", "from .. import global_topk", "fastprune"),
    ],
)
def test_a_planted_upward_import_is_caught(
    tmp_path: Path, path: str, line: str, target: str
) -> None:
    package = tmp_path / "fastprune"
    files = {
        "__init__.py": "from .ops import select\nfrom .train import run\n",
        "cli.py": "from . import ops\nfrom .train import run\n",
        "masks.py": "from .ops import select\nfrom . import structure\n",
        "structure.py": "import torch.optim\n",
        "ops/__init__.py": "from .native import build_info\nfrom . import reference\n",
        "ops/native.py": "from .reference import select\n",
        "ops/select.py": "from .reference.select import kept\n",
        "ops/reference/__init__.py": "from .select import kept\n",
        "ops/reference/select.py": "import torch\n",
        "optim/__init__.py": "from .gsm import GSM\n",
        "optim/gsm.py": "from ..masks import MaskSet\nfrom fastprune.ops import select\n",
        "train/__init__.py": "from ..optim import gsm\nfrom . import run\n",
        "train/run.py": "from ..ops.reference import select\n",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert upward_imports(package) == []

    planted = package / path
    planted.write_text(planted.read_text() + line + "\n")
    number = len(planted.read_text().splitlines())
    assert upward_imports(package) == [f"fastprune/{path}:{number} imports {target}"]


def test_a_module_without_a_layer_is_named(tmp_path: Path) -> None:
    package = tmp_path / "fastprune"
    package.mkdir()
    (package / "utils.py").write_text("import fastprune\n")
    with pytest.raises(LookupError, match=r"fastprune\.utils has no layer"):
        upward_imports(package)
