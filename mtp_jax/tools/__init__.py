"""Command lines beside train.py and eval.py."""
