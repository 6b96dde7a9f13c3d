"""Experts in other forms, and files of other projects as experts."""
