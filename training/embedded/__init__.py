"""The embedded teacher: its data and how it was trained."""
