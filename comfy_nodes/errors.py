"""What users can solve."""


class NodeError(ValueError):
    """One line that says what was expected, what was found and what to do. ComfyUI shows it on the node."""
