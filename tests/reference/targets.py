"""Depth-k inputs, targets and validity by brute force: each document is taken out and treated alone."""

from typing import NamedTuple

import numpy as np


class Targets(NamedTuple):
    """Depth k of position i reads x[i + k] and predicts x[i + 1 + k], both of i's own document or not at all.

    inputs, targets: int[K, B, T], 0 where the document has no such token. usable: the input exists. valid: the target
    exists.
    """

    inputs: np.ndarray
    targets: np.ndarray
    usable: np.ndarray
    valid: np.ndarray


def documents(segment_ids):
    """(start, end) of each document of one row: a run of one id that is not 0."""
    out, start = [], 0
    while start < len(segment_ids):
        end = start
        while end < len(segment_ids) and segment_ids[end] == segment_ids[start]:
            end += 1
        if segment_ids[start] != 0:
            out.append((start, end))
        start = end
    return out


def build(tokens, segment_ids, depth):
    """Targets of rows [B, T + 1 + D]."""
    tokens, segment_ids = np.asarray(tokens), np.asarray(segment_ids)
    B, length = tokens.shape
    T = length - 1 - depth
    out = Targets(*(np.zeros((depth + 1, B, T), kind) for kind in (int, int, bool, bool)))
    for b in range(B):
        for start, end in documents(segment_ids[b]):
            document = list(tokens[b, start:end])
            for k in range(depth + 1):
                for i in range(len(document)):
                    if start + i >= T:
                        continue
                    if i + k < len(document):
                        out.inputs[k, b, start + i] = document[i + k]
                        out.usable[k, b, start + i] = True
                    if i + 1 + k < len(document):
                        out.targets[k, b, start + i] = document[i + 1 + k]
                        out.valid[k, b, start + i] = True
    return out


def depth_segments(segment_ids, built):
    """Segment ids of each depth [K, B, T]: s where the depth's input and target exist, else 0."""
    segment_ids = np.asarray(segment_ids)
    K, B, T = built.valid.shape
    out = np.zeros((K, B, T), int)
    for k, b, i in np.ndindex(K, B, T):
        if built.valid[k, b, i] and built.usable[k, b, i]:
            out[k, b, i] = segment_ids[b, i]
    return out
