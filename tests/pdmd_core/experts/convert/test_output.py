from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdmd_core.experts.convert import conversions as convert_module
from pdmd_core.experts.convert.conversions import Conversion
from tests.helpers.conversions import (
    content,
    conversion,
    refused,
)


def test_an_existing_output_is_replaced_only_when_asked(
    lora: Path, tmp_path: Path, target: Callable[[Conversion], object]
) -> None:
    out = tmp_path / "deep" / "out"
    target(conversion(lora, out))
    first = content(out)
    with refused("exists", "--overwrite"):
        target(conversion(lora, out))
    assert content(out) == first
    weights = next(path for path in out.rglob("*.safetensors") if "vae" not in str(path))
    weights.write_bytes(b"old")
    target(conversion(lora, out, overwrite=True))
    assert content(out) == first
    assert {path.name for path in out.parent.iterdir()} == {"out"}


def test_overwrite_leaves_foreign_folders_and_files_alone(lora: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"text")
    for name in ("photos", "file"):
        with refused("not a folder of experts", "leaves it alone"):
            conversion(lora, tmp_path / name, overwrite=True).to_full()
    assert (tmp_path / "photos" / "cat.png").exists() and (tmp_path / "file").exists()


@pytest.mark.parametrize("where", [".", "..", "inside"])
def test_what_is_read_is_never_written_into(lora: Path, base: Path, tmp_path: Path, where: str) -> None:
    shutil.copytree(lora, tmp_path / "parent" / "experts")
    folder = tmp_path / "parent" / "experts"
    before = content(tmp_path)
    with refused("which is read", "choose another folder"):
        conversion(folder, folder / where, overwrite=True).to_full()
    with refused("which is read", str(base)):
        conversion(folder, base / where, overwrite=True).to_full()
    assert content(tmp_path) == before


@pytest.mark.parametrize("moment", ["first write", "last write", "rename"])
def test_a_full_disk_leaves_everything_as_it_was(
    lora: Path,
    tmp_path: Path,
    target: Callable[[Conversion], object],
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    conversion(lora, out).to_full()
    before = content(out)
    full_disk = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    rename = Path.rename

    def no_rename(self: Path, to: Path) -> Path:
        if to == out and self.name == "new":
            raise full_disk
        return rename(self, to)

    def no_space(*args: Any, **kwargs: Any) -> Any:
        raise full_disk

    if moment == "rename":
        monkeypatch.setattr(Path, "rename", no_rename)
    elif moment == "first write":
        for name in ("write_weights", "write_experts"):
            monkeypatch.setattr(convert_module, name, no_space)
    else:
        monkeypatch.setattr(Path, "write_text", no_space)
        monkeypatch.setattr(convert_module, "_save_scheduler", no_space)
        write = convert_module.write_weights
        calls = [2]

        def second_fails(path: Path, *args: Any) -> str:
            calls[0] -= 1
            if calls[0] == 0:
                path.write_bytes(b"half")
                raise full_disk
            return write(path, *args)

        monkeypatch.setattr(convert_module, "write_weights", second_fails)
    with refused(f"cannot write {out}", "No space left", "nothing was changed: make room"):
        target(conversion(lora, out, overwrite=True))
    assert content(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_too_small_a_disk_is_noticed_before_the_work(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    need = sum(e.stat().st_size for e in full.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, need // 2))
    monkeypatch.setattr(convert_module, "write_weights", lambda *args: pytest.fail("work was begun"))
    with refused("takes 183.6 kB", "kB are free", "make room"):
        conversion(full, tmp_path / "out").to_full()
    assert not (tmp_path / "out").exists()


def test_an_interrupt_leaves_nothing_behind(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "write_weights", interrupt)
    with pytest.raises(KeyboardInterrupt):
        conversion(lora, tmp_path / "out").to_full()
    assert not list(tmp_path.iterdir())
