from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest

from pdmd_core.experts import MANIFEST_NAME, ExpertsError, Manifest, read_manifest
from pdmd_core.experts.format.manifest import MAX_MANIFEST_BYTES
from pdmd_core.phases import PhasePlan
from tests.helpers.manifests import MISSING, VALID, changed, one_line


def refusal(data: object) -> str:
    """The one-line message with which this manifest is refused."""
    with pytest.raises(ExpertsError) as caught:
        Manifest.from_json(json.dumps(data))
    return one_line(caught.value)


# --- what is read is what was written ---------------------------------------


def test_a_manifest_survives_json_unchanged() -> None:
    manifest = Manifest.from_json(json.dumps(VALID))
    assert manifest.to_dict() == VALID
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert json.loads(manifest.to_json()) == VALID


def test_the_fields_of_a_manifest_are_those_of_the_file() -> None:
    manifest = Manifest.from_dict(VALID)
    high, low = manifest.experts
    assert manifest.plan == PhasePlan.from_steps([2, 2], shift=5.0)
    assert manifest.base.model == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" and manifest.base.revision == "main"
    assert (high.kind, high.rank, high.alpha, high.targets) == ("lora", 64, 8.0, ("attn1.to_q", "ffn.net.2"))
    assert (low.kind, low.rank, low.alpha, low.targets) == ("full", None, None, None)
    assert (high.component, low.component) == ("transformer", "transformer_2")
    assert manifest.expert("low_noise") is low


def test_optional_fields_have_defaults() -> None:
    data = copy.deepcopy(VALID)
    base = data["base"]
    for where, key in [(data, "guidance_scale"), (data, "training"), (base, "revision"), (base, "fingerprints")]:
        del where[key]
    for key in ("component", "rank", "alpha", "targets"):
        del data["experts"][1][key]
    manifest = Manifest.from_dict(data)
    assert (manifest.guidance_scale, manifest.training, manifest.base.revision) == (1.0, {}, None)
    assert manifest.base.fingerprints is None and "fingerprints" not in manifest.to_dict()["base"]
    assert Manifest.from_dict(changed("base.fingerprints", None)).base.fingerprints is None
    assert dataclasses.asdict(manifest.experts[1]) == {
        **{"name": "low_noise", "file": "low_noise.safetensors", "kind": "full", "sha256": "f" * 64},
        **{"component": "transformer", "rank": None, "alpha": None, "targets": None, "strength": 1.0},
    }


def test_a_strength_is_of_a_lora_expert_and_is_left_out_where_it_is_1() -> None:
    assert "strength" not in Manifest.from_dict(VALID).to_dict()["experts"][0]
    data = changed("experts.0.strength", -0.5)
    manifest = Manifest.from_dict(data)
    assert manifest.experts[0].strength == -0.5
    assert manifest.to_dict()["experts"][0]["strength"] == -0.5
    for place, value in (("experts.0.strength", 11), ("experts.0.strength", True), ("experts.1.strength", 0.5)):
        with pytest.raises(ExpertsError, match="strength is a number from -10 to 10, and 1 for a full expert"):
            Manifest.from_dict(changed(place, value))


def test_whole_numbers_are_read_where_a_number_is_expected() -> None:
    manifest = Manifest.from_dict(changed("experts.0.alpha", 8) | {"guidance_scale": 0})
    assert manifest.experts[0].alpha == 8.0 and manifest.guidance_scale == 0.0


def test_an_expert_that_is_not_there_is_an_error_that_lists_those_that_are() -> None:
    with pytest.raises(ExpertsError, match=r"no expert 'middle' here, expected one of: high_noise, low_noise$"):
        Manifest.from_dict(VALID).expert("middle")


# --- what is refused --------------------------------------------------------


def test_a_newer_format_says_upgrade_even_when_nothing_else_can_be_read() -> None:
    for data in (changed("format_version", 2), {"format_version": 17, "new": {}}):
        text = refusal(data)
        assert "reads up to 1" in text and "upgrade" in text and str(data["format_version"]) in text


@pytest.mark.parametrize("version", [0, -1, 1.5, "1", None, True, [1], MISSING])
def test_another_format_version_is_refused(version: object) -> None:
    assert refusal(changed("format_version", version)).startswith("format_version is 1, found ")


@pytest.mark.parametrize("data", [[], "text", 1, None, True])
def test_a_manifest_that_is_no_object_is_refused(data: object) -> None:
    refusal(data)
    with pytest.raises(ExpertsError, match="the manifest is an object"):
        Manifest.from_dict(data)


@pytest.mark.parametrize(
    "path",
    [
        *["base", "plan", "experts", "base.model", "base.architecture", "base.family"],
        *["experts.0.name", "experts.1.file", "experts.0.kind", "experts.1.sha256"],
    ],
)
def test_a_missing_field_is_named(path: str) -> None:
    assert f"lacks {path.rpartition('.')[2]}" in refusal(changed(path, MISSING))


@pytest.mark.parametrize("path", ["extra", "base.extra", "experts.1.extra"])
def test_an_unknown_field_is_named(path: str) -> None:
    assert "unknown field(s) 'extra'" in refusal(changed(path, 1))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("base", [], "base is an object, found list"),
        ("base.model", "", "base.model is a text of 1 to 500 printable characters, found ''"),
        ("base.family", 3, "base.family is a text of 1 to 500 printable characters, found 3"),
        ("base.revision", 7, "base.revision is a text of printable characters or null, found 7"),
        ("base.fingerprints", [], "base.fingerprints is an object or null, found []"),
        ("base.fingerprints.vae", {}, "a key of base.fingerprints is transformer or transformer_N, found 'vae'"),
        ("base.fingerprints.transformer", {}, "base.fingerprints.transformer is an object of 1 to 200 weight names"),
        ("base.fingerprints.transformer", 5, "base.fingerprints.transformer is an object of 1 to 200 weight names"),
        ("base.fingerprints.transformer", {str(n): "gD8=" for n in range(201)}, "an object of 1 to 200 weight names"),
        ("base.fingerprints.transformer", {"a\x1b[2J": "gD8="}, "an object of 1 to 200 weight names, found {'a\\x1b["),
        *[
            ("base.fingerprints.transformer", {"a": wrong}, "transformer['a'] is 1 to 32 finite values of bfloat16 in")
            for wrong in (None, 1.5, "", "gD8", "gD8=\n", "g!8=", "gA==", "gH8=", "wH8=", "\u0661gD8", "gD8A" * 22)
        ],
        ("guidance_scale", -1, "guidance_scale is a number from 0 to 100, found -1"),
        ("guidance_scale", True, "guidance_scale is a number from 0 to 100, found True"),
        ("guidance_scale", float("nan"), "guidance_scale is a number from 0 to 100, found nan"),
        ("guidance_scale", float("inf"), "guidance_scale is a number from 0 to 100, found inf"),
        ("guidance_scale", 100.5, "guidance_scale is a number from 0 to 100, found 100.5"),
        ("base.model", "x\x1b[2J", "base.model is a text of 1 to 500 printable characters, found 'x\\x1b[2J'"),
        ("base.model", "x" * 501, "base.model is a text of 1 to 500 printable characters, found 'xxx"),
        ("base.architecture", "os.system", "base.architecture is the name of a class, found 'os.system'"),
        ("base.architecture", "__loader__", "base.architecture is the name of a class, found '__loader__'"),
        ("base.revision", "a\nb", "base.revision is a text of printable characters or null, found 'a\\nb'"),
        ("experts.0.rank", 10**30, "experts[0].rank is a whole number from 1 to 65536, found 1000"),
        ("experts.0.targets", ["x"] * 10_001, "experts[0].targets is a list of 1 to 10000 module names, found ['x'"),
        ("experts.0.targets", [""], "experts[0].targets is a list of 1 to 10000 module names, found ['']"),
        ("training.size", [64, 64], "training.size is null or three whole numbers from 1 to 16384, found [64, 64]"),
        ("training.size", [10**9, 1, 1], "training.size is null or three whole numbers from 1 to 16384"),
        ("training.size", [64.0, 64, 1], "training.size is null or three whole numbers from 1 to 16384"),
        ("training.max_sequence_length", 10**9, "training.max_sequence_length is null or a whole number from 1 to"),
        ("training.loss", float("nan"), "training is an object of JSON, found {"),
        ("training.loss", {"deep": [float("-inf")]}, "training is an object of JSON, found {"),
        ("training.loss", b"0.5", "training is an object of JSON, found {"),
        ("guidance_scale", 10**400, "guidance_scale is a number from 0 to 100, found 1000"),
        ("training", [], "training is an object, found []"),
        ("experts", {}, "experts is a list, found {}"),
        ("experts.0", "high", "experts[0] is an object, found str"),
        ("experts.1.name", "a\nb", "experts[1].name is a text of printable characters, found 'a\\nb'"),
        ("experts.1.name", 5, "experts[1].name is a text of printable characters, found 5"),
        ("experts.0.kind", "lycoris", "experts[0].kind is lora or full, found 'lycoris'"),
        ("experts.0.kind", [], "experts[0].kind is lora or full, found []"),
        ("experts.0.sha256", "F" * 64, "experts[0].sha256 is 64 hexadecimal digits"),
        ("experts.0.sha256", "f" * 63, "experts[0].sha256 is 64 hexadecimal digits"),
        ("experts.0.sha256", "f" * 64 + "\n", "experts[0].sha256 is 64 hexadecimal digits"),
        ("experts.0.component", "text_encoder", "experts[0].component is transformer or transformer_N"),
        ("experts.0.component", "transformer_1", "experts[0].component is transformer or transformer_N"),
        ("experts.0.component", None, "experts[0].component is transformer or transformer_N"),
        ("experts.0.rank", 0, "experts[0].rank is a whole number from 1 to 65536, found 0"),
        ("experts.0.rank", 4.0, "experts[0].rank is a whole number from 1 to 65536, found 4.0"),
        ("experts.0.rank", True, "experts[0].rank is a whole number from 1 to 65536, found True"),
        ("experts.0.rank", None, "experts[0].rank is a whole number from 1 to 65536, found None"),
        ("experts.0.alpha", 0, "experts[0].alpha is a positive number, found 0"),
        ("experts.0.alpha", float("nan"), "experts[0].alpha is a positive number, found nan"),
        ("experts.0.alpha", -(10**400), "experts[0].alpha is a positive number, found -1000"),
        ("experts.0.alpha", "8", "experts[0].alpha is a positive number, found '8'"),
        ("experts.0.targets", [], "experts[0].targets is a list of 1 to 10000 module names, found []"),
        (
            "experts.0.targets",
            "attn1.to_q",
            "experts[0].targets is a list of 1 to 10000 module names, found 'attn1.to_q'",
        ),
        ("experts.0.targets", [1], "experts[0].targets is a list of 1 to 10000 module names, found [1]"),
        ("experts.1.rank", 4, "no rank, alpha or targets for a full expert"),
        ("experts.1.alpha", 4.0, "no rank, alpha or targets for a full expert"),
        ("experts.1.targets", [], "no rank, alpha or targets for a full expert"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_wrong_value_is_named_with_what_was_expected(path: str, value: object, expected: str) -> None:
    with pytest.raises(ExpertsError) as caught:  # not as text: NaN there is no JSON
        Manifest.from_dict(changed(path, value))
    assert expected in one_line(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        *["../x.safetensors", "/etc/x.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors"],
        *["C:x.safetensors", ".safetensors", ".hidden.safetensors", "..safetensors", "x.bin", "x.safetensors.bin"],
        *["x.safetensors\n", "x.safetensors\0", "x\0.safetensors", "~x.safetensors", "x y.safetensors", ""],
        *["%2e%2e%2fx.safetensors", "\u2024\u2024/x.safetensors", "x" * 200 + ".safetensors"],
        *[None, 7, ["x.safetensors"], {"path": "x.safetensors"}],
    ],
)
def test_a_file_that_is_no_plain_safetensors_name_is_refused(file: object) -> None:
    assert "experts[0].file is a plain file name that ends in .safetensors" in refusal(changed("experts.0.file", file))


def test_two_experts_cannot_share_a_file() -> None:
    text = refusal(changed("experts.1.file", "high_noise.safetensors"))
    assert "every expert has a file of its own" in text


def test_experts_and_phases_are_the_same_in_the_same_order() -> None:
    reversed_experts = changed("experts", VALID["experts"][::-1])
    missing = changed("experts", VALID["experts"][:1])
    twice = changed("experts", [*VALID["experts"], VALID["experts"][0]])
    renamed = changed("experts.0.name", "middle")
    for data in (reversed_experts, missing, twice, renamed, changed("experts", [])):
        assert "one expert for each phase, in the same order" in refusal(data)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("plan.phases", [], "at least one phase"),
        ("plan.phases.1.sigmas", [], "'low_noise' has no sigmas"),
        ("plan.phases.1.sigmas", [0.95, 0.625], "descend"),
        ("plan.phases.1.sigmas", [0.9375, 0.625], "descend"),
        ("plan.phases.0.sigmas", [0.99, 0.9375], "the first sigma is 1"),
        ("plan.phases.0.sigmas", [1000.0, 937.5], "timesteps"),
        ("plan.phases.0.sigmas", [1.0, float("nan")], "numbers in (0, 1]"),
        ("plan.phases.0.sigmas", [10**400], "sigmas"),
        ("plan.phases.0.name", "low_noise", "must differ"),
        ("plan.phases.0.name", "High Noise", "lower-case"),
        ("plan.boundary", 0.875, "exactly the keys"),
    ],
)
def test_a_plan_with_missing_or_overlapping_phases_is_refused(path: str, value: object, expected: str) -> None:
    with pytest.raises(ExpertsError) as caught:
        Manifest.from_dict(changed(path, value))
    text = one_line(caught.value)
    assert text.startswith("plan: ") and expected in text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"format_version": 1, "format_version": 1}', "the key 'format_version' is there twice"),
        ('{"format_version": 1, "base": {"model": "a", "model": "b"}}', "the key 'model' is there twice"),
        ('{"training": {"loss": NaN}}', "NaN is no number"),
        ('{"training": {"loss": [-Infinity]}}', "-Infinity is no number"),
        ('{"training": {"loss": 1e999}}', "'1e999' is beyond every number"),
        ('{"training": ' + "[" * 32 + "]" * 32 + "}", "more than 32 objects and lists in each other"),
        (r'{"training": {"note": "\ud83d"}}', "half of a surrogate pair is no character"),
        (r'{"training": {"\uDE00note": 1}}', "half of a surrogate pair is no character"),
    ],
    ids=["twice", "twice-inside", "nan", "infinity", "too-large", "too-deep", "half-a-pair", "half-a-pair-as-key"],
)
def test_json_that_can_be_read_in_two_ways_or_not_at_all_is_refused(text: str, fault: str) -> None:
    with pytest.raises(ExpertsError, match="is not JSON") as caught:
        Manifest.from_json(text)
    assert fault in one_line(caught.value)


def test_any_character_may_be_in_a_summary() -> None:
    note = "a smile \U0001f600, \u00fc, a line\nand another"
    for text in (
        json.dumps(changed("training.note", note)),
        json.dumps(changed("training.note", note), ensure_ascii=False),
    ):
        assert Manifest.from_json(text).training["note"] == note


def test_a_number_that_is_not_finite_is_written_as_null() -> None:
    manifest = Manifest.from_dict(VALID)
    odd = dataclasses.replace(manifest, training={"loss": float("nan"), "deep": [{"worst": float("inf"), "best": 0.5}]})
    again = Manifest.from_json(odd.to_json())
    assert again.training == {"loss": None, "deep": [{"worst": None, "best": 0.5}]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "not json",
        "\ufeff{}",
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 5000,
        '{"format_version": 1' + "0" * 5000,
    ],
    ids=["empty", "open", "words", "byte-order-mark", "deep-list", "deep-object", "huge-number", "huge-version"],
)
def test_text_that_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ExpertsError, match="is not JSON") as caught:
        Manifest.from_json(text)
    one_line(caught.value)


# --- nesting ----------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["guidance_scale", "plan", "plan.phases.0.name", "experts.0.rank", "experts.0.targets"]
)
def test_nesting_of_any_depth_where_it_does_not_belong_is_refused(path: str) -> None:
    around = json.dumps(changed(path, "HERE"))
    for depth in [50, 400, *range(800, 1001), 3000]:  # every depth near the interpreter's recursion limit
        for opening, closing in [('{"a":', "}"), ("[", "]")]:
            with pytest.raises(ExpertsError) as caught:
                Manifest.from_json(around.replace('"HERE"', opening * depth + "1" + closing * depth))
            one_line(caught.value)


def test_a_training_summary_may_be_nested_but_not_deep() -> None:
    around = json.dumps(changed("training", "HERE"))
    for depth in (1, 31, 32, 50, 300, 3000):
        text = around.replace('"HERE"', '{"a":' * depth + "1" + "}" * depth)
        if depth < 32:
            assert Manifest.from_json(text).training
        else:
            with pytest.raises(ExpertsError, match="more than 32 objects and lists in each other"):
                Manifest.from_json(text)


# --- the file ---------------------------------------------------------------


def test_read_manifest_reads_the_file_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(VALID))
    assert read_manifest(tmp_path).to_dict() == VALID


def file_refusal(folder: Path) -> str:
    with pytest.raises(ExpertsError) as caught:
        read_manifest(folder)
    text = one_line(caught.value)
    assert text.startswith(str(folder))
    return text


def test_a_folder_without_a_manifest_says_where_to_look(tmp_path: Path) -> None:
    assert "no such folder" in file_refusal(tmp_path / "nowhere")
    (tmp_path / "README.md").write_text("not a folder")
    assert "README.md: a file; give the experts folder, which holds" in file_refusal(tmp_path / "README.md")
    assert f"no {MANIFEST_NAME} here" in file_refusal(tmp_path)
    (tmp_path / MANIFEST_NAME).mkdir()
    assert f"no {MANIFEST_NAME} here" in file_refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfe{}", "not UTF-8"),
        (b"{", "is not JSON"),
        (json.dumps(changed("format_version", 2)).encode(), "upgrade"),
        (json.dumps(VALID).encode() + b" " * MAX_MANIFEST_BYTES, f"at most {MAX_MANIFEST_BYTES}"),
    ],
    ids=["not-text", "not-json", "newer", "too-large"],
)
def test_a_bad_file_is_refused_with_its_path_in_front(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    text = file_refusal(tmp_path)
    assert MANIFEST_NAME in text and expected in text
