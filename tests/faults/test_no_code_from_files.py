"""Nothing in this repository runs what a file says: no pickle, no eval, no remote code."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdmd_core.experts import ExpertsError
from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines import load_phased_pipeline
from tests.helpers.faults.watch import only_reads
from tests.helpers.tiny import lora_roles, save_wan_pipeline, write_lora_experts

ROOT = Path(__file__).parents[2]
SHIPPED = ("pdmd_core", "comfy_nodes", "training", "benchmarks", "__init__.py")
PICKLES = {"_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
RUN = {"eval", "exec", "compile", "__import__"}
TENSORS_ONLY = {f"pdmd_core/metrics/{name}.py" for name in ("extractors", "perceptual", "preference")}
"""Where ``torch.load(..., weights_only=True)`` is allowed: feature networks as their authors publish them."""


def sources() -> Iterator[Path]:
    for part in SHIPPED:
        path = ROOT / part
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def faults(code: str) -> list[str]:
    """What must not be there, as ``line: what``."""
    found = []
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Import():
                names = [alias.name.partition(".")[0] for alias in node.names]
                found += [(node, name) for name in names if name in PICKLES]
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in PICKLES | {"pickle"}:
                found.append((node, module))
            case ast.Call(func=ast.Attribute(value=ast.Name(id="pickle"))):  # but for its errors
                if not ast.unparse(node.func).endswith("Error"):
                    found.append((node, ast.unparse(node.func)))
            case ast.ClassDef() if any("Unpickler" in ast.unparse(base) for base in node.bases):
                found.append((node, "an unpickler"))
            case ast.Call(func=ast.Name(id=name)) if name in RUN:
                found.append((node, name))
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load")):
                keywords = {k.arg: k.value for k in node.keywords}
                only = keywords.get("weights_only")
                if not (isinstance(only, ast.Constant) and only.value is True):
                    found.append((node, "torch.load without weights_only=True"))
            case ast.Call(func=ast.Attribute(attr=("load" | "load_all" | "unsafe_load" | "full_load") as name)):
                if isinstance(node.func.value, ast.Name) and node.func.value.id == "yaml":
                    found.append((node, f"yaml.{name}"))
            case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr=("system" | "popen") as name)):
                found.append((node, f"os.{name}"))
            case ast.keyword(arg=("trust_remote_code" | "allow_pickle" | "shell") as name):
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    found.append((node.value, name))
            case ast.Constant(value="trust_remote_code"):
                found.append((node, "trust_remote_code"))
    return [f"{getattr(node, 'lineno', 0)}: {what}" for node, what in found]


def test_no_source_runs_what_it_reads() -> None:
    paths = list(sources())
    assert len(paths) > 80
    found = {str(path.relative_to(ROOT)): faults(path.read_text(encoding="utf-8")) for path in paths}
    assert not {name: lines for name, lines in found.items() if lines}


def test_tensors_are_unpickled_only_where_it_is_said() -> None:
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sources()}
    assert {name for name, text in texts.items() if "torch.load(" in text} == TENSORS_ONLY


@pytest.mark.parametrize(
    "code",
    [
        *["pickle.load(f)", "pickle.loads(b)", "pickle.Unpickler(f)", "from pickle import loads", "import dill.source"],
        *["import os, marshal", "class U(pickle.Unpickler): pass"],
        *["eval('1')", "exec(text)", "compile(text, '', 'exec')", "__import__(name)"],
        *["torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=flag)"],
        *["yaml.load(t)", "yaml.unsafe_load(t)", "os.system(c)", "os.popen(c)", "subprocess.run(c, shell=True)"],
        *["A.from_pretrained(x, trust_remote_code=True)", "np.load(p, allow_pickle=True)", "{'trust_remote_code': 1}"],
    ],
)
def test_the_check_finds_what_it_looks_for(code: str) -> None:
    assert faults(f"def f():\n    {code}")


def test_the_check_takes_what_is_safe() -> None:
    safe = ["raise pickle.UnpicklingError(x)", "torch.load(p, weights_only=True)", "yaml.safe_load(t)"]
    safe += ["np.load(p)", "model.eval()", "torch.compile(m)"]
    assert [faults(code) for code in safe] == [[]] * len(safe)


# --- a base of a stranger's ------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan_pipeline(tmp_path_factory.mktemp("base") / "wan")


CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from diffusers import WanPipeline as Mine
"""


@pytest.mark.parametrize("place", ["pipeline", "component"])
def test_code_that_lies_in_a_base_is_not_run(base: Path, tmp_path: Path, place: str) -> None:
    """The manifest of a stranger's experts names the base: diffusers runs code there only for who asks for it."""
    folder, marker = tmp_path / "base", tmp_path / "marker"
    shutil.copytree(base, folder)
    index = json.loads((folder / "model_index.json").read_text())
    code = CODE.format(marker=str(marker))
    if place == "pipeline":
        (folder / "mine.py").write_text(code)
        (folder / "pipeline.py").write_text(code)
        index["_class_name"] = ["mine", "Mine"]
    else:
        (folder / "transformer" / "mine.py").write_text(code)
        index["transformer"] = ["mine", "Mine"]
    (folder / "model_index.json").write_text(json.dumps(index))
    plan = PhasePlan.from_steps([1], shift=5.0)
    write_lora_experts(tmp_path / "experts", plan, lora_roles(plan), str(folder))
    with pytest.raises(ExpertsError, match=r"custom code|remote code|trust_remote_code") as caught:
        load_phased_pipeline(tmp_path / "experts")
    assert not marker.exists() and len(str(caught.value).splitlines()) == 1


# --- the watch of the other tests -------------------------------------------------


def test_the_watch_notices_what_reaches_out(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "file").write_text("x")
    (tmp_path / "outside").write_text("x")
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside")

    def watched(act: object) -> str:
        with pytest.raises(AssertionError) as caught, only_reads(tmp_path / "inside"):
            act()  # type: ignore[operator]
        return str(caught.value)

    with only_reads(tmp_path / "inside"):
        (tmp_path / "inside" / "file").read_text()
        (tmp_path / "inside" / ".." / "inside" / "file").read_bytes()
    assert "outside" in watched(lambda: (tmp_path / "outside").read_text())
    assert "outside" in watched(lambda: (tmp_path / "inside" / "link").read_text())
    assert "outside" in watched(lambda: (tmp_path / "inside" / ".." / "outside").read_text())
    assert re.search(r"write .*inside/file", watched(lambda: (tmp_path / "inside" / "file").write_text("y")))
    assert "os.remove" in watched(lambda: (tmp_path / "inside" / "file").unlink())
    assert "os.listdir" in watched(lambda: list(tmp_path.iterdir()))
    assert "exec" in watched(lambda: eval("1"))  # noqa: S307
    assert "os.system" in watched(lambda: __import__("os").system("true"))
