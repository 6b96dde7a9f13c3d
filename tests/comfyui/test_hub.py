"""Load Phased Experts with a Hub id: the unmodified client on a hub on loopback, in a ComfyUI of its own process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pdmd_core.phases import PhasePlan
from tests.comfyui import install
from tests.comfyui.conftest import VERSION
from tests.helpers import tiny
from tests.helpers.comfyui.server import make_base
from tests.helpers.hub import Hub
from tests.helpers.hub_client import Client, Outcome

PREPARE = """
import sys
from pathlib import Path
import torch
from tests.helpers.comfyui.in_process import load_pack
from tests.helpers.comfyui.tiny_models import TinyModels
pack = load_pack(Path({tree!r}), Path({base!r}))
models = TinyModels(Path({base!r}))
sys.hub_test = (pack, models, models.wan())
"""
LOAD = """
import sys
import torch
{before}
pack, models, network = sys.hub_test
def sampled(**chosen):
    chosen = dict(hub_id="", strength=1.0, cfg="trained", set_shift=True, base_1=network) | chosen
    model, plan = pack.call("PhasedDMDLoadExperts", **chosen)
    prompts = [models.conditioning("wan", seed) for seed in (7, 8)]
    return pack.call("PhasedDMDSampler", model=model, seed=1, steps=0, cfg=1.0, sampler_name="euler", denoise=1.0,
                     positive=prompts[0], negative=prompts[1], latent_image=models.latent("wan"))[0]["samples"]
result = torch.equal(sampled(experts="(Hub id)", hub_id={hub_id!r}), sampled(experts="tiny"))
"""


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    """``load(hub_id, code)``: whether the node, after this code, gives what it gives for the same files in a folder."""
    base, plan = make_base(tmp_path_factory.mktemp("hub") / "base"), PhasePlan.from_steps([2, 2], shift=5.0)
    folder = base / "models/phased_experts/tiny"
    tiny.write_lora_experts(folder, plan, tiny.lora_roles(plan))
    with Hub() as hub, Client(hub.url, base / "home", token=None) as client:
        hub.put("user/tiny", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
        done = client.run(PREPARE.format(tree=str(install.tree(VERSION)), base=str(base)))
        assert done.error is None, done

        def load(hub_id: str, before: str = "") -> Outcome:
            return client.run(LOAD.format(hub_id=hub_id, before=before))

        load.hub = hub  # type: ignore[attr-defined]
        yield load


def in_words(outcome: Outcome, message: str) -> None:
    assert outcome.kind in ("ExpertsError", "NodeError"), outcome
    assert message in str(outcome.error) and "\n" not in str(outcome.error)


def test_a_hub_id_gives_the_experts_of_the_repository_and_later_works_without_a_connection(
    load: Callable[..., Outcome],
) -> None:
    hub: Hub = load.hub  # type: ignore[attr-defined]
    assert load(" user/tiny ").result is True
    asked = len(hub.requests)
    assert asked > 3
    offline = "import huggingface_hub.constants as constants; constants.HF_HUB_OFFLINE = True"
    assert load("user/tiny", offline).result is True
    in_words(load("user/other"), "user/other is not, or not wholly, in the cache: load it once with a connection")
    assert len(hub.requests) == asked
    online = offline.replace("True", "False")
    hub.fail(".*", times=1000)
    assert load("user/tiny", online).result is True
    hub.faults.clear()
    assert len(hub.requests) > asked


@pytest.mark.parametrize(
    ("hub_id", "before", "message"),
    [
        ("user/none", "", "no such repository, or it is private"),
        ("tiny", "", "neither a folder nor a Hub id user/name"),
        ("../secret", "", "neither a folder nor a Hub id user/name"),
        (
            "user/tiny",
            "hidden = sys.modules.get('huggingface_hub'); sys.modules['huggingface_hub'] = None",
            "needs the package huggingface_hub, which ComfyUI installs",
        ),
    ],
)
def test_what_cannot_be_loaded_from_the_hub_is_said_in_words(load, hub_id: str, before: str, message: str) -> None:
    in_words(load(hub_id, before), message)


def test_huggingface_hub_is_among_comfyuis_own_packages() -> None:
    """Its requirements name transformers, which needs it."""
    from importlib.metadata import requires

    wanted = (install.tree(VERSION) / "requirements.txt").read_text()
    assert any(line.startswith("transformers") for line in wanted.splitlines())
    assert any(line.startswith("huggingface-hub") for line in requires("transformers") or [])
