"""The configuration of a run: its schema, its sections, how it is read, how errors are reported."""
