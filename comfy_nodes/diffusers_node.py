"""The node that loads a Wan pipeline in diffusers' layout."""

from __future__ import annotations

from comfy_api.latest import io

from .diffusers_folder import folder_names, load
from .errors import in_words
from .schema import schema


class LoadDiffusersFolder(io.ComfyNode):
    """The node that loads a Wan pipeline in diffusers' layout."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return schema(
            "PhasedDMDLoadDiffusersFolder",
            display_name="Load Wan Pipeline (diffusers folder)",
            description="MODEL, CLIP and VAE of a stock WanPipeline folder, of any size. A clone of Phased DMD ships a "
            "tiny one, 'teacher', that samples on a CPU in seconds.",
            search_aliases=["phased dmd", "diffusers loader", "embedded teacher", "wan checkpoint"],
            inputs=[
                io.Combo.Input(
                    "folder", options=folder_names(), tooltip="A folder with model_index.json in models/diffusers."
                ),
                io.Int.Input(
                    "tokens",
                    default=512,
                    min=1,
                    max=4096,
                    tooltip="Number of tokens that prompts are padded to; experts want the number they were distilled "
                    "with (max_sequence_length in their manifest).",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The transformer."),
                io.Clip.Output(tooltip="The text encoder."),
                io.Vae.Output(tooltip="The autoencoder."),
            ],
        )

    @classmethod
    @in_words
    def execute(cls, folder: str, tokens: int) -> io.NodeOutput:
        """Load the folder."""
        return io.NodeOutput(*load(folder, tokens))
