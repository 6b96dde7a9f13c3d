"""LoRA files of all programs: what their keys mean, and the change of weights that they hold."""
