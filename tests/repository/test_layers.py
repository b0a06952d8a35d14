"""The package is a ladder: imports go down only, the mathematics knows torch alone, and nothing unsafe is called.

All of it is read from the source, so a module is checked without being imported.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence

import pytest

from tests.support.layers import (
    FILES,
    LAYERS,
    MOST_TOP_LEVEL_MODULES,
    circles,
    imports_in,
    imports_of,
    inside,
    layer,
    ours,
    reach_up,
    room,
    top_level_modules,
    tree_of,
)  # fmt: skip

MATHEMATICS = ("divergences", "temperature", "loss", "models.head")
#: ``dts-hf --help`` and the check of a recipe's own keys must not wait for heavy libraries.
LIGHT = (
    "dts_hf", "__main__", "console", "errors", "files", "registry", "recipe", "runs.directory", "runs.failures",
    "runs.names", "runs.file_lists", "runs.links", "runs.lock", "runs.stopping", "data.row_files", "data.columns",
    "data.file_limits", "data.routes", "data.table_files", "data.text_files", "evaluation.benchmark_sets",
    "evaluation.protocol", "on_policy.settings", "cli",
)  # fmt: skip
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "evaluate",
    "matplotlib",
    "numpy",
    "pyarrow",
    "rouge_score",
}


def stands_in(module: str, places: Sequence[str]) -> bool:
    """Whether ``module`` or its room is one of ``places``."""
    return inside(module) in places or room(module) in places


every_module = pytest.mark.parametrize("module", FILES)


# -------------------------------------------------------------------------------------------------------------- layers


def test_every_module_has_its_place() -> None:
    assert [module for module in FILES if layer(module) is None] == []
    named = {name.split(".")[0] for _, names in LAYERS for name in names}
    assert named == {room(module) for module in FILES}


def test_a_stranger_sees_few_modules_at_the_top() -> None:
    assert len(top_level_modules()) <= MOST_TOP_LEVEL_MODULES


def test_nothing_imports_from_above() -> None:
    assert reach_up() == []
    assert not [item for item in imports_of("dts_hf") if ours(item.module) and item.when == "loading"]


def test_no_circle() -> None:
    """Imports for annotations count."""
    assert circles() == []


@every_module
def test_private_names_stay_in_their_module(module: str) -> None:
    """A private module is its room's; a private name is its module's."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and ours(node.module or ""):
            same_room = room(node.module or "") == room(module)
            private = [
                alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"
            ]
            modules = [name for name in private if same_room and f"{node.module}.{name}" in FILES]
            assert private == modules, f"line {node.lineno}: {private}"


@every_module
def test_the_mathematics_imports_torch_alone(module: str) -> None:
    if not stands_in(module, MATHEMATICS):
        return
    for found in imports_of(module):
        if ours(found.module):
            below = ("errors", "registry", "distributed.sharding", *MATHEMATICS)
            assert stands_in(found.module, below), f"line {found.line}: {found.module}"
        else:
            library = found.module.split(".")[0]
            allowed = ("torch", "triton") if module == "dts_hf.loss.kernels" else ("torch",)
            assert library in allowed or library in sys.stdlib_module_names, f"line {found.line}: {library}"


@every_module
def test_light_modules_load_nothing_heavy(module: str) -> None:
    if not stands_in(module, LIGHT):
        return
    for found in imports_of(module):
        if found.when == "loading":
            assert found.module.split(".")[0] not in HEAVY, f"line {found.line}: {found.module}"
            assert not ours(found.module) or stands_in(found.module, LIGHT), f"line {found.line}: {found.module}"


# -------------------------------------------------------------------------------------------------------------- safety


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


# evaluate.load runs a file of the current folder; the others run code that comes with the data.
UNSAFE = (
    "evaluate.load",
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "joblib.load",
    "numpy.load",
    "np.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "eval",
    "exec",
)
#: It has an Unpickler that makes none but a few classes, each of them named there.
RESTRICTED = "dts_hf.distributed.checkpoint_reading"


@every_module
def test_nothing_unsafe_is_called(module: str) -> None:
    for name, call in calls(module):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        as_data = name == "torch.load" and given.get("weights_only") == "True"
        assert name not in UNSAFE or as_data, f"line {call.lineno}: {name}"
        for option in ("trust_remote_code", "shell", "weights_only"):
            assert given.get(option) != ("False" if option == "weights_only" else "True"), (
                f"line {call.lineno}: {option}"
            )
    if module != RESTRICTED:
        unsafe = {"pickle", "marshal", "shelve", "joblib"}
        assert not {found.module.split(".")[0] for found in imports_of(module)} & unsafe
    imported = [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.ImportFrom)]
    taken = {f"{node.module}.{alias.name}" for node in imported for alias in node.names}
    assert not taken & set(UNSAFE)


@every_module
def test_yaml_is_read_with_a_safe_loader(module: str) -> None:
    safe = {"yaml.SafeLoader"} | {
        node.name
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]
    }
    for name, call in calls(module):
        if name in ("yaml.load", "yaml.load_all"):
            loaders = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "Loader"]
            assert len(loaders) == 1 and loaders[0] in safe, f"line {call.lineno}"


@every_module
def test_code_from_the_hub_is_off_unless_asked_for(module: str) -> None:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "trust_remote_code":
            assert node.value is not None and ast.unparse(node.value).startswith("Field(default=False")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            positional = node.args.posonlyargs + node.args.args
            defaults = dict(zip(reversed([a.arg for a in positional]), reversed(node.args.defaults)))
            defaults |= {a.arg: d for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults) if d is not None}
            if "trust_remote_code" in defaults:
                assert ast.unparse(defaults["trust_remote_code"]) == "False", f"line {node.lineno}"


# ----------------------------------------------------------------------------------------------- the test tests itself


def test_imports_are_told_apart() -> None:
    source = (
        "import a\nif TYPE_CHECKING:\n    from b import c\ndef f():\n    import d\n    class E:\n        import e\n"
        "class G:\n    import g\ntry:\n    from dts_hf import errors\nexcept ImportError:\n    pass\n"
    )
    found = [(item.module, item.when) for item in imports_in(ast.parse(source))]
    assert found == [
        ("a", "loading"),
        ("b", "typing"),
        ("d", "calling"),
        ("e", "calling"),
        ("g", "loading"),
        ("dts_hf.errors", "loading"),
    ]
