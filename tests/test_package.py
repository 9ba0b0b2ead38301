"""The package as a whole: what imports what, and what using a quantized model loads."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import vqdm

ROOT = Path(vqdm.__file__).parent
FLOORS = (
    "small",
    "additive",
    "layers",
    "storage",
    "diffusion",
    "program",
    "call",
)  # each imports from those before it only
PROGRAMS = ("quantization", "finetuning", "generation", "metrics")
# Modules beside the rooms that belong to a floor above the small ones.
PLACES = {"images": "storage", "conversion": "program", "api": "call"}
REPEATABLE = ("job", "config", "plan", "__init__")
RESEARCH = (
    "quantization",
    "finetuning",
    "generation",
    "metrics",
    "diffusion",
    "documents",
    "cli",
    "parallel",
    "tracking",
)
SOLVER = ("solve", "encode", "beam", "scoring", "trellis_solve", "viterbi", "codebooks")
HEAVY = ("torchmetrics", "open_clip", "matplotlib", "wandb", "pandas", "torch_fidelity", "pyarrow")


def module_name(path: Path) -> str:
    """The name below vqdm: "additive.code", or "" of the package itself."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def room(name: str) -> str:
    """The room of a module; of one beside the rooms, its own name."""
    return name.split(".")[0]


def floor(name: str) -> str:
    found = room(name)
    if found in PROGRAMS:
        return "program"
    return found if found in FLOORS else PLACES.get(found, "small")


def imported(tree: ast.Module) -> set[str]:
    """Modules of vqdm that a module imports anywhere, but for types only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            both = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name.removeprefix("vqdm.") in MODULES else node.module for name in both}
    return {name.removeprefix("vqdm.") for name in found if name.startswith("vqdm.")}


@pytest.mark.parametrize("name", sorted(set(MODULES) - {""}))
def test_imports_go_down_and_not_between_programs(name):
    for other in imported(MODULES[name]):
        down = FLOORS.index(floor(other)) <= FLOORS.index(floor(name))
        between = floor(name) == floor(other) == "program" and room(name) != room(other)
        assert down and not between, f"vqdm.{name} imports vqdm.{other}"


def test_the_package_itself_imports_only_what_runs_a_quantized_model():
    assert {floor(name) for name in imported(MODULES[""])} <= {"additive", "layers", "storage"}


def test_no_two_modules_have_one_name():
    names = Counter(name.rpartition(".")[2] for name in MODULES if name not in (*FLOORS, *PROGRAMS, ""))
    assert {name for name, count in names.items() if count > 1 and name not in REPEATABLE} == set()


def test_no_two_classes_have_one_name():
    names = Counter(node.name for tree in MODULES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert not {name for name, count in names.items() if count > 1}


def names_in(tree: ast.Module) -> set[str]:
    """Names that a module defines or imports at its top level."""
    found = set()
    for node in tree.body:
        for part in node.body if isinstance(node, ast.If | ast.Try) else [node]:
            if isinstance(part, ast.FunctionDef | ast.ClassDef):
                found.add(part.name)
            elif isinstance(part, ast.Import | ast.ImportFrom):
                found |= {alias.asname or alias.name for alias in part.names}
            elif isinstance(part, ast.Assign | ast.AnnAssign):
                found |= {
                    one.id for one in ast.walk(part) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
                }
    return found


@pytest.mark.parametrize("folder", ["src", "benchmarks", "assets/make", "scripts", "tests", "."])
def test_what_is_imported_from_the_package_exists(folder):
    """Also in programs that no test runs."""
    held = {f"vqdm.{name}".rstrip("."): names_in(tree) for name, tree in MODULES.items()}
    held["vqdm"] |= set(vqdm.__all__)  # some are imported on first use
    root = Path(__file__).parents[1] / folder
    for path in root.glob("*.py") if folder == "." else root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vqdm":
                for alias in node.names:
                    found = f"{node.module}.{alias.name}" in held or alias.name in held.get(node.module, ())
                    assert found, f"{path}: {node.module}.{alias.name}"


def test_the_map_names_every_module():
    """Kernels go by the name of what they compute, with the kind of kernel after it."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", text[text.index("## Map") : text.index("### Which file")]))
    names = {re.sub(r"_(cpu|triton)$", "", name.rpartition(".")[2]) for name in MODULES}
    assert not names - named - {"", "__init__"}


def in_a_new_process(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_no_research_code():
    loaded = set(in_a_new_process("import sys, vqdm; print(*sys.modules)").split())
    assert "vqdm.layers.quantized" in loaded
    research = {f"vqdm.{name}" for name in RESEARCH} | {f"vqdm.additive.{name}" for name in SOLVER}
    assert not loaded & (research | set(HEAVY))


def test_public_names_are_found_and_listed():
    assert set(vqdm.__all__) <= set(dir(vqdm))
    assert all(getattr(vqdm, name).__name__ == name for name in vqdm.__all__)
    with pytest.raises(AttributeError, match="module 'vqdm' has no attribute 'nothing'"):
        _ = vqdm.nothing


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(vqdm._LAZY, "quantize", "a_package_that_is_missing")
    with pytest.raises(
        ImportError, match=r"needs the package a_package_that_is_missing: pip install 'vqdm\[quantize\]'"
    ):
        _ = vqdm.quantize
