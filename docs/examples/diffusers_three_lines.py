"""Sample with phase experts in diffusers: ``python docs/examples/diffusers_three_lines.py`` in a clone.

It takes ``pip install -e ".[diffusers]"``. The experts may also be an id on the Hugging Face Hub.
"""

from pdmd_core import load_phased_pipeline

pipe = load_phased_pipeline("training/embedded/models/experts")
picture = pipe("a panda on a blue background", width=64, height=64, num_frames=1, output_type="pil").frames[0][0]
picture.save("panda.png")
