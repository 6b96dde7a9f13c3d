"""The README's lines for diffusers with the experts on a hub: the same picture as from the folder, also offline."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.hub import Hub
from tests.helpers.hub_client import Client

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "training" / "embedded" / "models"
FOLDER = '"training/embedded/models/experts"'
_, CODE, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def picture(process: Client, code: str, cwd: Path) -> bytes:
    """What the code saves."""
    (cwd / "panda.png").unlink(missing_ok=True)
    outcome = process.run(f"import os\nos.chdir({str(cwd)!r})\n{code}")
    assert outcome.error is None, outcome.error
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
        with Client(hub.url, home, token=None) as online:
            expected = picture(online, seeded, clone)
            assert picture(online, from_hub, clone) == expected
            assert picture(online, base_too, elsewhere) == expected
    with Client(hub.url, home, token=None, HF_HUB_OFFLINE="1") as offline:
        assert picture(offline, from_hub, clone) == expected
        assert picture(offline, base_too, elsewhere) == expected
