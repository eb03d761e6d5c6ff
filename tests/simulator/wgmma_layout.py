"""Images, descriptors and fragments of wgmma operands (PTX ISA "wgmma: Shared Memory Matrix Layout")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.helpers import swizzled

SWIZZLE_CODE = {0: 0, 128: 1, 64: 2, 32: 3}


@dataclass(frozen=True)
class Layout:
    """Canonical layout of a 16-bit operand [mn, k]; k_major: K is contiguous. Offsets in bytes."""

    mn: int
    k: int
    k_major: bool
    swizzle: int
    leading: int
    stride: int

    def offsets(self) -> np.ndarray:
        """Byte offset of each element from a 1024-byte aligned start, [mn, k]."""
        mn, k = np.meshgrid(np.arange(self.mn), np.arange(self.k), indexing="ij")
        span = self.swizzle or 16
        if self.k_major and self.swizzle:
            plain = mn % 8 * span + mn // 8 * self.stride + k * 2
        elif self.k_major:
            plain = mn % 8 * 16 + mn // 8 * self.stride + k % 8 * 2 + k // 8 * self.leading
        elif self.swizzle:
            atom = span // 2
            plain = mn % atom * 2 + mn // atom * self.leading + k % 8 * span + k // 8 * self.stride
        else:
            plain = mn % 8 * 2 + mn // 8 * self.stride + k % 8 * 16 + k // 8 * self.leading
        return swizzled(plain, self.swizzle)

    def image(self, values: np.ndarray) -> np.ndarray:
        """uint8 image of 16-bit patterns [mn, k], a multiple of 1024 bytes; unused bytes are 0xff (NaN)."""
        offsets = self.offsets()
        size = -(-(int(offsets.max()) + 2) // 1024) * 1024
        image = np.full(size, 0xFF, np.uint8)
        words = image.view(np.uint16)
        words[offsets // 2] = values
        return image

    @property
    def descriptor(self) -> int:
        """Descriptor but for the start address."""
        return self.leading >> 4 << 16 | self.stride >> 4 << 32 | SWIZZLE_CODE[self.swizzle] << 62

    @property
    def step(self) -> int:
        """Bytes from one slice of 16 in K to the next."""
        if self.k_major:
            return 32 if self.swizzle else 2 * self.leading
        return 2 * (self.stride if self.swizzle else self.leading)


def layout(mn: int, k: int, k_major: bool, swizzle: int, spread: bool = False) -> Layout:
    """Compact layout; `spread` exchanges, without swizzle, which of the two dimensions is outer."""
    groups_mn, groups_k = mn // 8, k // 8
    if not swizzle:
        inner_k = k_major != spread
        outer = 128 * (groups_k if inner_k else groups_mn)
        return Layout(mn, k, k_major, 0, *((128, outer) if inner_k else (outer, 128)))
    if k_major:
        return Layout(mn, swizzle // 2, True, swizzle, 16, 8 * swizzle)
    return Layout(mn, k, False, swizzle, groups_k * 8 * swizzle, 8 * swizzle)


def accumulator_index(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of accumulator i of each of 128 threads, [128, n / 2] (PTX ISA "Matrix fragments")."""
    thread, i = np.meshgrid(np.arange(128), np.arange(n // 2), indexing="ij")
    row = thread // 32 * 16 + thread % 32 // 4 + i % 4 // 2 * 8
    return row, i // 4 * 8 + thread % 4 * 2 + i % 2


def a_fragments(values: np.ndarray) -> np.ndarray:
    """Registers of A [64, k] 16-bit patterns: uint32 [k / 16, 128, 4]."""
    slices = values.shape[1] // 16
    thread, register, half = np.meshgrid(np.arange(128), np.arange(4), np.arange(2), indexing="ij")
    row = thread // 32 * 16 + thread % 32 // 4 + register % 2 * 8
    column = thread % 4 * 2 + half + register // 2 * 8
    parts = [values[row, s * 16 + column] for s in range(slices)]
    return np.ascontiguousarray(np.stack(parts).astype(np.uint16)).view(np.uint32)[..., 0]
