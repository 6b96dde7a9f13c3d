"""Phased DMD: phase plans, objectives, rollouts, expert files and expert routing.

Importing this package needs nothing but the standard library; each module imports what it uses. Inside ComfyUI it is
loaded under another package name, so all imports within are relative.
"""
