"""The rules that let tokenizers/ live beside Hugging Face's `tokenizers`, and that keep imports one-way."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = set(PROJECT["tool"]["setuptools"]["packages"])
MAY_IMPORT = {
    "data": set(),
    "tokenizers": {"data"},
    "lm": set(),
    "diffusion": set(),
    "tasks": {"data", "tokenizers", "lm", "diffusion"},
    "evaluation": {"data"},
    "engine": {"data", "tokenizers", "lm", "diffusion", "tasks", "evaluation"},
    "scripts": {"data", "engine"},
}
FOLDERS = [folder for folder in (*MAY_IMPORT, "conf") if (ROOT / folder).exists()]
HOMES = {  # who may import what: everything else must run without it
    "lightning": lambda path: path.startswith(("engine/", "scripts/")) or path == "data/module.py",
    "hydra": lambda path: path.startswith("scripts/"),
    "omegaconf": lambda path: path.startswith(("scripts/", "engine/")),
    "av": lambda path: path.startswith("data/"),
}


def sources(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts]


def imports_of(path: Path) -> set[str]:
    """The dotted names of the modules that a file imports, at its head or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path.relative_to(ROOT)}:{node.lineno} imports relatively; write reelm.folder.module"
            )
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_only_conf_and_the_root_have_an_init():
    found = {str(p.parent.relative_to(ROOT)) for d in (*FOLDERS, "tests") for p in (ROOT / d).rglob("__init__.py")}
    assert found <= {"conf"}, f"delete __init__.py in {found - {'conf'}}: it hides other packages of that name"
    assert (ROOT / "conf/__init__.py").exists(), "conf/__init__.py is missing: Hydra finds pkg://reelm.conf by it"


def test_every_folder_is_packaged():
    files = [f for d in FOLDERS for f in (ROOT / d).rglob("*") if f.suffix in {".py", ".yaml"}]
    needed = {"reelm"} | {".".join(("reelm", *f.relative_to(ROOT).parent.parts)) for f in files}
    missing = sorted(needed - PACKAGES)
    assert not missing, f"add {missing} to packages in pyproject.toml; the wheel would lack them"
    stale = sorted(PACKAGES - needed)
    assert not stale, f"remove {stale} from packages in pyproject.toml; they hold no file"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_is_linked_for_type_checkers(folder):
    assert (ROOT / ".links/reelm" / folder).exists(), f"run: ln -s ../../{folder} .links/reelm/{folder}"


def test_no_script_hides_another_module():
    hidden = {f.stem for f in (ROOT / "scripts").glob("*.py")} & (
        sys.stdlib_module_names | {"tokenizers", "transformers"}
    )
    assert not hidden, f"rename scripts/{hidden}: `python scripts/train.py` would import it instead of the real one"


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "conf"])
def test_imports_point_one_way(folder):
    for path in sources(folder):
        ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("reelm.")}
        extra = ours - MAY_IMPORT[folder] - {folder}
        allowed = sorted(MAY_IMPORT[folder]) or "nothing"
        assert not extra, f"{path.relative_to(ROOT)} imports {extra}; {folder}/ may import {allowed}"


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_stay_where_they_belong(library):
    for path in [path for folder in FOLDERS for path in sources(folder)]:
        where = path.relative_to(ROOT).as_posix()
        used = library in {name.split(".")[0] for name in imports_of(path)}
        assert not used or HOMES[library](where), f"{where} imports {library}, which has its home elsewhere"


def test_nothing_unpickles():
    for path in [path for folder in FOLDERS for path in sources(folder)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                assert safe, (
                    f"{path.relative_to(ROOT)}:{node.lineno} torch.load without weights_only=True runs strangers' code"
                )
        assert not {"pickle", "dill", "cloudpickle", "joblib"} & {n.split(".")[0] for n in imports_of(path)}, path


def test_importing_the_package_is_cheap():
    code = "import reelm, sys; assert reelm.__version__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", "`import reelm` alone must not import torch"


def test_the_public_face_names_what_exists():
    import reelm

    for name in reelm.__all__:
        assert getattr(reelm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = reelm.nothing
    assert reelm.__version__ == PROJECT["project"]["version"]


def test_hugging_face_tokenizers_is_not_hidden():
    """Run from the root as `python -m ...` does, where ./tokenizers is first on the path."""
    code = "import tokenizers; tokenizers.Tokenizer; import reelm.tokenizers.tokens"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_programs_named_in_the_project_exist():
    for program, target in PROJECT["project"]["scripts"].items():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), program
