"""The error of experts that cannot be used."""


class ExpertsError(ValueError):
    """An experts folder that cannot be used: one line with what was expected, what was found and what to do."""
