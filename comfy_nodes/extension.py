"""What ComfyUI asks the pack for: the nodes, and a route on which the front end asks for the plan of widgets."""

from __future__ import annotations

from aiohttp import web
from comfy_api.latest import ComfyExtension, io

from ..pdmd_core.experts import ExpertsError
from ..pdmd_core.phases import PhasePlanError
from . import diffusers_folder, loaded, loading
from .errors import NodeError, worded
from .language import speaking

PLAN_ROUTE = "/phased_dmd/plan"
"""The route on which the front end asks for the plan of widgets."""
SIGMAS_ROUTE = "/phased_dmd/ksampler_sigmas"
"""The route on which it asks for the sigmas of a KSampler that it replaces."""


class PhasedDMDExtension(ComfyExtension):
    """The node pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Register folders and the route, and list the nodes; ComfyUI calls this once at start."""
        from server import PromptServer

        loading.register_folder()
        diffusers_folder.register_folder()
        server = getattr(PromptServer, "instance", None)
        if server is not None:
            server.routes.post(PLAN_ROUTE)(_plan)
            server.routes.post(SIGMAS_ROUTE)(_ksampler_sigmas)
            server.add_on_prompt_handler(loaded.let_go)
        return _nodes()


def _nodes() -> list[type[io.ComfyNode]]:
    from .diffusers_node import LoadDiffusersFolder
    from .expert_nodes import ExpertsFromLoRAs, ExpertsFromModels, LoadExperts
    from .plan_nodes import (
        PlanFromBoundary,
        PlanFromExperts,
        PlanFromPreset,
        PlanFromSigmas,
        PlanFromSteps,
        PlanReport,
        Sigmas,
    )
    from .sampler_node import PhasedSampler

    plans = [PlanFromSteps, PlanFromPreset, PlanFromBoundary, PlanFromSigmas, PlanFromExperts]
    return [
        LoadExperts,
        ExpertsFromModels,
        ExpertsFromLoRAs,
        *plans,
        Sigmas,
        PhasedSampler,
        PlanReport,
        LoadDiffusersFolder,
    ]


async def _plan(request: web.Request) -> web.Response:
    """The time line of a node with these widget values and sources, before anything is queued."""
    from .preview import preview

    try:
        asked = await request.json()
        with speaking(str(asked.get("locale", "en")), str(asked.get("client", ""))):
            try:
                return web.json_response(preview(asked))
            except (NodeError, PhasePlanError, ExpertsError) as error:
                return web.json_response({"error": worded(str(error))})
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return web.json_response({"error": "not the widgets of a node of this pack"}, status=400)


async def _ksampler_sigmas(request: web.Request) -> web.Response:
    """The sigmas of a KSampler with these widgets, or what is wrong with them."""
    from .ksampler_sigmas import ksampler_sigmas

    try:
        asked = await request.json()
        with speaking(str(asked.get("locale", "en")), ""):
            try:
                return web.json_response({"sigmas": ksampler_sigmas(asked)})
            except NodeError as error:
                return web.json_response({"error": worded(str(error))})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return web.json_response({"error": "not the widgets of a KSampler"}, status=400)
