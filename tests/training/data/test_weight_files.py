"""Weights that are read part by part from their files are those that diffusers loads."""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from pdmd_core.experts.format.fingerprint import fingerprint_of
from pdmd_core.families import family
from tests.helpers.configs import changed
from tests.helpers.families.cases import OF_FAMILIES
from tests.helpers.families.wan import wan_two_networks
from training.data import encoder as encoding
from training.data.examples import Example
from training.data.teacher import TeacherError, TeacherSource, load_image_side, networks_of, pipeline_on_meta
from training.data.weight_files import WeightFiles
from training.loop import build
from training.memory.static import static_memory

NAMES = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def two_networks(tmp_path_factory: pytest.TempPathFactory) -> TeacherSource:
    """Each network in several files."""
    folder = tmp_path_factory.mktemp("two")
    wan_two_networks().save_pretrained(folder, max_shard_size="40KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    return TeacherSource(str(folder))


def files_of(source: TeacherSource, dtype: torch.dtype) -> WeightFiles:
    return WeightFiles(source, networks_of(pipeline_on_meta(source), family("wan")), dtype)


def loaded(source: TeacherSource, dtype: torch.dtype) -> dict[str, nn.Module]:
    return networks_of(load_image_side(source, dtype), family("wan"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_the_networks_that_diffusers_loads(two_networks: TeacherSource, dtype: torch.dtype) -> None:
    """Also in bfloat16, of which diffusers keeps some weights in float32."""
    files, networks = files_of(two_networks, dtype), loaded(two_networks, dtype)
    digest = hashlib.sha256()
    for component, network in networks.items():
        for name, value in network.state_dict().items():
            digest.update(f"{component} {name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    assert files.digest() == digest.hexdigest(), "also the one of checkpoints of earlier versions"
    assert files.fingerprints() == {component: fingerprint_of(network) for component, network in networks.items()}
    for component, hollow in files.hollow().items():
        own, wanted = hollow.state_dict(), networks[component].state_dict()
        assert {name: (v.dtype, v.shape) for name, v in own.items()} == {
            name: (v.dtype, v.shape) for name, v in wanted.items()
        }
        assert {v.untyped_storage().nbytes() for v in hollow.parameters()} <= {2, 4}, "a number each"
        buffers = zip(hollow.named_buffers(), networks[component].named_buffers(), strict=True)
        assert all(one == other and torch.equal(value, same) for (one, value), (other, same) in buffers)


@pytest.mark.parametrize("rank", [0, 2, 3])
def test_each_process_reads_its_own_shards_and_holds_no_more(
    settings_of_run: dict[str, Any], two_networks: TeacherSource, rank: int
) -> None:
    """Process ``rank`` of four; some weights have fewer than four rows."""
    settings_of_run["model"] |= {"path": two_networks.path, "dtype": "bfloat16"}
    config = changed(settings_of_run, **{"parallel.sharding": "fsdp", "plan.shift": 5.0})
    files, wanted = files_of(two_networks, torch.bfloat16), loaded(two_networks, torch.bfloat16)
    routing = family("wan").teacher_routing(pipeline_on_meta(two_networks).config)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("shard",))
        roles = build.build_roles(
            config, family("wan"), files.hollow(), routing, torch.device("cpu"), mesh, files=files
        )
        held = 0
        for component in NAMES:
            for name, value in roles.base_state_dict(component).items():
                whole = wanted[component].state_dict()[name]
                assert isinstance(value, DTensor) and value.dtype == whole.dtype
                parts = whole.chunk(4)
                own = parts[rank] if rank < len(parts) else whole[:0]
                assert torch.equal(value.to_local(), own), name
                held += value.to_local().untyped_storage().nbytes()
    finally:
        dist.destroy_process_group()
    meta = build.Roles(networks_of(pipeline_on_meta(two_networks), family("wan")), family("wan"), {}, routing)
    predicted = static_memory(config, config.plan.build(), meta, 4).parts[0].bytes
    assert held == pytest.approx(predicted, rel=0.1)


def test_weights_that_are_not_there_are_one_line(two_networks: TeacherSource, tmp_path: Path) -> None:
    pipeline = wan_two_networks()
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    source = TeacherSource(str(tmp_path))
    with pytest.raises(TeacherError, match=r"transformer has no diffusion_pytorch_model\.safetensors: save it again"):
        files_of(source, torch.float32)
    pipeline.save_pretrained(tmp_path)
    described = networks_of(pipeline_on_meta(source), family("wan"))
    described["transformer"].register_parameter("other", nn.Parameter(torch.empty(3, device="meta")))
    with pytest.raises(TeacherError, match=r"transformer needs other of shape \(3,\), its files have none"):
        WeightFiles(source, described, torch.float32)


@pytest.mark.parametrize("name", ["ltx2", "hunyuan_video_15"])
def test_all_that_encodes_prompts_is_narrow_and_nothing_else(name: str, tmp_path: Path) -> None:
    """Also what stands between the text encoder and the network; an autoencoder that comes along stays exact."""
    case = OF_FAMILIES[name]
    case.build().save_pretrained(tmp_path)
    assert case.family is not None
    encoder = encoding.Encoder(TeacherSource(str(tmp_path)), case.family, case.tokens, dtype=torch.bfloat16)
    conditioning = encoder.texts([Example("a panda")], None)
    assert all(value.isfinite().all() for value in conditioning.values())
    for part, component in encoder.pipeline.components.items():
        if isinstance(component, nn.Module):
            assert {p.dtype for p in component.parameters()} == {torch.float32 if part == "vae" else torch.bfloat16}


def test_batches_are_halved_where_memory_runs_out(teacher: Path) -> None:
    wan, sizes, most = family("wan"), list[int](), 3
    examples, source = [Example(f"panda {k}") for k in range(7)], TeacherSource(str(teacher))
    expected = encoding.Encoder(source, wan, 12).texts(examples, None)
    encode = wan.encode_prompts

    def short(pipeline: Any, prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pipeline, prompts, *rest)

    with mock.patch.object(wan, "encode_prompts", short):
        encoder = encoding.Encoder(source, wan, 12, batch=8)
        found = encoder.texts(examples, None)
        assert sizes == [7, 4, 2, 2, 2, 1]
        torch.testing.assert_close(found["prompt_embeds"], expected["prompt_embeds"])
        most = 0
        with pytest.raises(torch.OutOfMemoryError):
            encoder.texts(examples, None)


def test_text_encoders_are_narrow_and_gone_when_networks_come(settings_of_run: dict[str, Any]) -> None:
    """Encoders of prompts in bfloat16 for networks in 16 bits; no network has weights while they are there."""
    there: list[weakref.ref[nn.Module]] = []
    load_text, load_image = encoding.load_text_side, build.load_image_side

    def text(*arguments: Any) -> DiffusionPipeline:
        pipeline = load_text(*arguments)
        assert {p.dtype for p in pipeline.text_encoder.parameters()} == {torch.bfloat16}
        there.append(weakref.ref(pipeline.text_encoder))
        return pipeline

    def image(*arguments: Any) -> DiffusionPipeline:
        assert len(there) == 1 and there[0]() is None
        return load_image(*arguments)

    settings_of_run["model"] |= {"dtype": "bfloat16"}
    with mock.patch.object(encoding, "load_text_side", text), mock.patch.object(build, "load_image_side", image):
        run = build.build_run(changed(settings_of_run))
    assert run.data.prompts.conditioning(torch.tensor([0]), torch.device("cpu"))["prompt_embeds"].isfinite().all()
