"""The error raised for plans that are damaged, impossible, or made for something else."""


class PlanError(ValueError):
    """A plan cannot be made, read or applied; the message says what was found, expected and what to do."""
