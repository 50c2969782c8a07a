"""Layers: one per file, each tested against an oracle in tests/reference/."""
