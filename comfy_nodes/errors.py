"""The error of what users can solve themselves."""


class NodeError(ValueError):
    """One line that says what was expected, what was found and what to do. ComfyUI shows it on the node."""
