"""A run: how it is built, its trainer, the updates of a phase, checkpoints, what it resumes from."""
