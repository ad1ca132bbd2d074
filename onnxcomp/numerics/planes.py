"""Codes of 2, 3, 5 or 6 bits in so many bits each: cut into planes, whose bytes a table turns into codes again.

    code = sum over planes of table[byte]        3 bits: a plane of 2 and one of 1; 5: 4 and 1; 6: 4 and 2

A plane of w bits holds 8 codes in w bytes. Its table says what each byte stands for, shifted to its place, and in the last
plane with the sign.
"""

import numpy as np

from onnxcomp.numerics.affine import Codes

Plane = tuple[int, int]
"""Width and shift."""


def planes(bits: int) -> list[Plane]:
    """The planes that codes of so many bits are cut into, lowest bits first."""
    widths = [w for w in (4, 2, 1) if bits & w]
    return [(w, sum(widths[:i])) for i, w in enumerate(widths)]


def pack(codes: Codes, plane: Plane) -> np.ndarray:
    """The bytes of one plane of `codes`, whose number 8 divides: uint8 [n, 2, ...], n groups of 8."""
    w, shift = plane
    fields = (codes.astype(np.int32).reshape(-1, 8 // w) >> shift) & (2**w - 1)
    return (fields << w * np.arange(8 // w)).sum(axis=1).astype(np.uint8).reshape(-1, *[2] * (w.bit_length() - 1))


def table(bits: int, plane: Plane) -> np.ndarray:
    """What each byte of a plane stands for: int8 [256, 2, ...], the codes of one byte."""
    w, shift = plane
    values = ((np.arange(256)[:, None] >> w * np.arange(8 // w)) & (2**w - 1)) << shift
    values -= (values & 2 ** (bits - 1)) << 1
    return values.astype(np.int8).reshape(256, *[2] * (4 - w.bit_length()))
