"""The README's lines for diffusers with the experts on a hub: the same picture as from the folder, also offline."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.helpers.hub import Hub
from tests.helpers.hub_client import Client, client_environment

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "training" / "embedded" / "models"
FOLDER = '"training/embedded/models/experts"'
_, CODE, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def picture(code: str, cwd: Path, environment: dict[str, str] | None = None) -> bytes:
    """What the code saves."""
    (cwd / "panda.png").unlink(missing_ok=True)
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return (cwd / "panda.png").read_bytes()


def test_the_lines_of_the_readme_with_a_hub_id(tmp_path: Path) -> None:
    clone, elsewhere, home = tmp_path / "clone", tmp_path / "elsewhere", tmp_path / "home"
    for folder in (clone, elsewhere):
        folder.mkdir()
        (folder / "pdmd_core").symlink_to(ROOT / "pdmd_core")
    (clone / "training").symlink_to(ROOT / "training")
    assert FOLDER in CODE
    seeded = CODE.replace('output_type="pil")', 'output_type="pil", generator=torch.Generator().manual_seed(0))')
    assert seeded != CODE
    seeded = "import torch\n" + seeded
    expected = picture(seeded, clone)
    from_hub = seeded.replace(FOLDER, '"user/panda-experts"')
    base_too = seeded.replace(FOLDER, '"user/panda-experts", base="user/teacher"')
    with Hub() as hub:
        with Client(hub.url, home) as client:
            for code in (
                f"from pdmd_core.experts.hub import push_experts\npush_experts({str(MODELS / 'experts')!r}, "
                "'user/panda-experts')",
                "from huggingface_hub import HfApi\napi = HfApi()\napi.create_repo('user/teacher')\n"
                f"api.upload_folder(repo_id='user/teacher', folder_path={str(MODELS / 'teacher')!r})",
            ):
                outcome = client.run(code)
                assert outcome.error is None, outcome.error
        environment = client_environment(hub.url, home, token=None)
        assert picture(from_hub, clone, environment) == expected
        assert picture(base_too, elsewhere, environment) == expected
        offline = client_environment(hub.url, home, token=None, HF_HUB_OFFLINE="1")
    assert picture(from_hub, clone, offline) == expected
    assert picture(base_too, elsewhere, offline) == expected
