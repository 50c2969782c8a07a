"""The parts of the planner: chips and topologies, compiling, reading what was compiled, rooflines, search, tables."""
