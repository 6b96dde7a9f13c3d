"""Carrying later patches from one MODEL to another."""

from __future__ import annotations

from comfy_nodes.model_options import copied, with_added_options


class Leaf:
    pass


OLD, NEW, OWN = Leaf(), Leaf(), Leaf()


def test_a_copy_has_new_containers_and_the_same_leaves() -> None:
    options = {"a": {"b": [OLD, {"c": NEW}]}}
    copy = copied(options)
    assert copy == options
    assert copy["a"] is not options["a"] and copy["a"]["b"] is not options["a"]["b"]
    assert copy["a"]["b"][0] is OLD
    copy["a"]["b"][1]["c"] = OWN
    assert options["a"]["b"][1]["c"] is NEW


def test_only_what_was_added_is_carried_over() -> None:
    then = {"functions": [OLD], "nested": {"x": OLD, "y": OLD}, "gone": OLD}
    now = {"functions": [OLD, NEW], "nested": {"x": NEW, "y": OLD, "z": NEW}, "added": NEW}
    own = {"functions": [OWN], "nested": {"y": OWN}, "kept": OWN}
    assert with_added_options(own, now, then) == {
        "functions": [OWN, NEW],
        "nested": {"x": NEW, "y": OWN, "z": NEW},
        "kept": OWN,
        "added": NEW,
    }
    assert own == {"functions": [OWN], "nested": {"y": OWN}, "kept": OWN}


def test_nothing_added_changes_nothing() -> None:
    options = {"functions": [OLD], "nested": {"x": {"y": [OLD]}}, "number": 3}
    own = {"nested": {"x": {"y": [OWN]}}}
    assert with_added_options(own, options, copied(options)) == {"nested": {"x": {"y": [OWN]}}, "functions": []}


def test_new_branches_and_lists_are_made_and_some_keys_are_left_alone() -> None:
    now = {"wrappers": {"apply": {"compile": [NEW], None: [NEW]}}, "bound": {"x": NEW}}
    assert with_added_options({}, now, {}, skip={"compile", "bound"}) == {"wrappers": {"apply": {None: [NEW]}}}
    assert with_added_options({"bound": OWN}, now, {}, skip={"bound", "wrappers"}) == {"bound": OWN}
