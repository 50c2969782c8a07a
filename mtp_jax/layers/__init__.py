"""The building blocks: one layer a file, each against an oracle in tests/reference/."""
