"""Command lines in addition to train.py and eval.py."""
