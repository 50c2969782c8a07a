"""Nested dicts of arrays: to float64, and one entry of a stack."""

import numpy as np


def as_float64(tree):
    """The same nested dict with every leaf a float64 numpy array."""
    if isinstance(tree, dict):
        return {name: as_float64(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)


def entry(tree, index):
    """Entry `index` of the leading axis of every leaf."""
    if isinstance(tree, dict):
        return {name: entry(value, index) for name, value in tree.items()}
    return tree[index]


def unstack(tree):
    """A stack of blocks (every leaf with a leading layer axis) as a list of blocks."""
    leaf = tree
    while isinstance(leaf, dict):
        leaf = next(iter(leaf.values()))
    return [entry(tree, index) for index in range(len(leaf))]
