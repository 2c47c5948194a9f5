"""Codes of a few bits, packed into bytes."""

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes into bytes, the lowest bit first and without gaps.

    Args:
      codes: uint8 of any shape, each below 2^bits.
      bits: bits per code, 1 to 8.

    Returns:
      uint8 `[ceil(codes.size * bits / 8)]`; the unused bits of the last byte are zeros.
    """
    places = np.arange(bits, dtype=np.uint8)
    return np.packbits((codes.reshape(-1, 1) >> places) & 1, bitorder="little")


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Unpacks the codes of `pack`, uint8 of `shape`.

    Raises:
      ValueError: for another number of bytes than such codes fill, or a bit set after the last.
    """
    count = int(np.prod(shape))
    expected = -(-count * bits // 8)
    if packed.dtype != np.uint8 or packed.shape != (expected,):
        raise ValueError(f"expected uint8 ({expected},), found {packed.dtype} {packed.shape}")
    flat = np.unpackbits(packed, bitorder="little")
    if flat[count * bits :].any():
        raise ValueError("its last byte has bits that belong to no weight")
    places = np.arange(bits, dtype=np.uint8)
    codes = (flat[: count * bits].reshape(-1, bits) << places).sum(1, dtype=np.uint8)
    return codes.reshape(shape)
