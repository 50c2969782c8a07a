"""Modules of the planner: chips and topologies, compilation, parsing of compiled programs, rooflines, search, text."""
