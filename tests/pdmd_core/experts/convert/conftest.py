"""A stock pipeline and its experts of both kinds, on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pdmd_core.experts.convert.conversions import Conversion
from tests.helpers.conversions import TARGETS, conversion, write_lora_folder
from tests.helpers.tiny import save_wan_pipeline


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock pipeline on disk."""
    return save_wan_pipeline(tmp_path_factory.mktemp("base") / "wan")


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """An experts folder of two LoRA experts; not to be changed."""
    return write_lora_folder(tmp_path_factory.mktemp("lora") / "experts", base)


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory, lora: Path) -> Path:
    """The same, merged; not to be changed."""
    folder = tmp_path_factory.mktemp("full") / "experts"
    conversion(lora, folder).to_full()
    return folder


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest) -> Callable[[Conversion], object]:
    return TARGETS[request.param]
