"""The options of commands that sample with a teacher's pipeline: where it computes, and in which memory."""

from __future__ import annotations

from typing import Any

from pdmd_core import arguments


def add_machine_options(group: Any) -> None:
    """Add ``--device``, ``--batch_size``, ``--dtype``, ``--offload`` and ``--decode`` to a group of argparse."""
    group.add_argument("--device", type=arguments.text, help="cuda, cuda:1, cpu ... (default: a GPU if there is one)")
    group.add_argument(
        "--batch_size",
        type=arguments.COUNT,
        metavar="N",
        help="samples at once (default: 1 for large samples, up to 64)",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the networks (default: float32; large teachers take bfloat16)",
    )
    group.add_argument(
        "--offload",
        choices=("none", "network", "blocks"),
        default="none",
        help="what waits in host memory: of two networks the one that does not run, or all blocks but two (default: "
        "none)",
    )
    group.add_argument(
        "--decode",
        choices=("auto", "whole", "tiled", "cpu"),
        default="auto",
        help="how samples are decoded: whole, in tiles or on the CPU (default: the first for which there is memory)",
    )
