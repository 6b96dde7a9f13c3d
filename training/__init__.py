"""The trainer of phase experts: three commands, and a folder for each concern."""
