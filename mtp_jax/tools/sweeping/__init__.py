"""Modules of tools.sweep: the grid of runs, their folders, their processes."""
