"""What `benchmarks.kernels` measures: its rows, the fewest bytes and operations of each, and data.

Both sides' workers read it, each under its own Python: NumPy and the standard library only.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7}
ITEMSIZE = {"float32": 4, "bfloat16": 2}
EXPANSIONS = (9, 3, 1)
# ShiftResNet20 and 56 have the same blocks: image size, then channels in and out, and the stride.
STAGES = ((32, 16, 16, 1), (16, 32, 32, 1), (8, 64, 64, 1))
DOWNSAMPLING = ((32, 16, 32, 2), (16, 32, 64, 2))
ROWS_AT_ONCE = (1, 4, 16)
# By bits, what S3 weights (sign weights for 1 bit) can be.
LEVELS: dict[int, tuple[int, ...]] = {
    1: (-1, 1),
    2: (-1, 0, 1),
    3: (-4, -2, -1, 0, 1, 2, 4),
    4: (-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64),
}
# Convolutions of one image as products: pixels of the result, values that each reads, channels out.
WRN20_10 = (
    (1024, 9 * 160, 160),
    (256, 9 * 160, 320),
    (256, 9 * 320, 320),
    (64, 9 * 320, 640),
    (64, 9 * 640, 640),
)
RESNET18 = (
    (3136, 9 * 64, 64),
    (784, 9 * 64, 128),
    (784, 64, 128),  # 1x1, beside a block with a stride
    (784, 9 * 128, 128),
    (196, 9 * 128, 256),
    (196, 128, 256),
    (196, 9 * 256, 256),
    (49, 9 * 256, 512),
    (49, 256, 512),
    (49, 9 * 512, 512),
)
SAMPLES = 2048


class Floor(NamedTuple):
    """The time below which no program can go.

    Attributes:
      seconds: of one operation.
      limit: "memory" or "arithmetic", whichever takes longer.
    """

    seconds: float
    limit: str


class Ceilings(NamedTuple):
    """What the device was measured to do: bytes/s of a copy, operations/s of a product."""

    bytes_a_second: float
    operations_a_second: float


class Row:
    """One operation at one shape.

    Attributes:
      operation: the function's name in `shiftnet.kernels`.
      key: names the row; `--only` selects by it.
      kind: rows of a kind do the same at different shapes.
      terms: of the longest sum.
    """

    operation: str

    @property
    def key(self) -> str:
        raise NotImplementedError

    @property
    def kind(self) -> str:
        return "/".join(self.key.split("/")[:2])

    @property
    def terms(self) -> int:
        raise NotImplementedError

    def moved_bytes(self, dtype: str) -> float:
        """Bytes of all that must be read and written, each once."""
        raise NotImplementedError

    def operations(self) -> float:
        """Multiplications and additions of the products, counted apart."""
        raise NotImplementedError

    def floor(self, ceilings: Ceilings, dtype: str) -> Floor:
        """The larger of the bytes at a copy's speed and the arithmetic at a large product's."""
        memory = self.moved_bytes(dtype) / ceilings.bytes_a_second
        arithmetic = self.operations() / ceilings.operations_a_second
        return max(Floor(memory, "memory"), Floor(arithmetic, "arithmetic"))

    @property
    def by_norm(self) -> bool:
        """Whether an error is one of norms, not the largest of all values.

        A gradient through a ReLU jumps where rounding moves a value across zero, which is rare.
        """
        return False

    def tolerance(self, dtype: str) -> float:
        """Largest error over the root mean square of the exact values, see `by_norm`.

        Some values are rounded to `dtype` on the way and at the end, a value far above the mean by
        as much more; sums are taken in float32, whose errors grow with the root of their length.
        """
        rounding = (6 if self.by_norm else 12) * EPSILON[dtype]
        return rounding + 4 * EPSILON["float32"] * math.sqrt(self.terms)


@dataclasses.dataclass(frozen=True)
class ImageRow(Row):
    """An operation of a shift block on a batch of square images.

    Attributes:
      operation: "shift", "shift_pointwise" or "shift_block".
      variant: of shift_pointwise "alone", or "inference" with all that inference has around it; of
        shift_block "inference", or "training": forward and backward.
      expansion: expanded channels over the block's outputs.
      batch: images.
      size: their height and width.
      inputs, outputs: the block's channels.
      stride: of the second convolution.
    """

    operation: str
    variant: str
    expansion: int
    batch: int
    size: int
    inputs: int
    outputs: int
    stride: int

    @property
    def middle(self) -> int:
        """Channels of the expanded tensor."""
        return self.outputs * self.expansion

    @property
    def key(self) -> str:
        channels = {
            "shift": str(self.middle),
            "shift_pointwise": f"{self.middle}-{self.outputs}",
            "shift_block": f"{self.inputs}-{self.middle}-{self.outputs}",
        }[self.operation]
        stride = f"/stride{self.stride}" if self.stride > 1 else ""
        return f"{self.kind}/e{self.expansion}/{self.size}x{self.size}x{channels}{stride}"

    @property
    def kind(self) -> str:
        return f"{self.operation}/{self.variant}" if self.variant else self.operation

    @property
    def pixels(self) -> int:
        """Of all images."""
        return self.batch * self.size**2

    @property
    def out_pixels(self) -> int:
        """Of all results."""
        return self.batch * (-(-self.size // self.stride)) ** 2

    @property
    def residual_is_input(self) -> bool:
        """Whether a block adds its own input, not that through a convolution."""
        return self.stride == 1 and self.inputs == self.outputs

    @property
    def terms(self) -> int:
        if self.by_norm:
            return self.pixels
        return {"shift": 0}.get(self.operation, max(self.inputs, self.middle))

    def moved_bytes(self, dtype: str) -> float:
        # Of the expanded tensor a result needs one value of each channel, with a stride too.
        expanded, out = self.out_pixels * self.middle, self.out_pixels * self.outputs
        image = self.pixels * self.inputs
        if self.operation == "shift":
            values = 2 * expanded
        elif self.operation == "shift_pointwise":
            values = expanded + self.middle * self.outputs + out
            if self.variant == "inference":
                values += out + 2 * self.middle + 2 * self.outputs
        else:
            weights = self.middle * (self.inputs + 1 + self.outputs)
            if self.variant == "inference":
                residual = 0 if self.residual_is_input else out
                values = image + weights + self.outputs + residual + out
            else:  # both directions read the images and the weights, and gradients are as large
                values = (image + weights + out) + (image + weights + out) + (image + weights)
        return values * ITEMSIZE[dtype]

    def operations(self) -> float:
        second = 2 * self.out_pixels * self.middle * self.outputs
        if self.operation == "shift":
            return 0
        if self.operation == "shift_pointwise":
            return second
        first = 2 * self.out_pixels * self.inputs * self.middle
        # Backward, each product has two, none of them to have the expanded tensor again.
        return (first + second) * (3 if self.variant == "training" else 1)

    @property
    def by_norm(self) -> bool:
        return self.variant == "training"

    def tolerance(self, dtype: str) -> float:
        return 0.0 if self.operation == "shift" else super().tolerance(dtype)


@dataclasses.dataclass(frozen=True)
class MatrixRow(Row):
    """`packed_matmul` of a few rows with a matrix.

    Attributes:
      net: the network whose layer it is, or "large".
      rows: of x.
      inputs, outputs: of the matrix.
      bits: of a weight.
    """

    net: str
    rows: int
    inputs: int
    outputs: int
    bits: int
    operation: str = "packed_matmul"

    @property
    def key(self) -> str:
        return (
            f"{self.operation}/{self.net}/{self.rows}x{self.inputs}x{self.outputs}/{self.bits}bit"
        )

    @property
    def terms(self) -> int:
        return self.inputs

    def moved_bytes(self, dtype: str) -> float:
        packed = self.inputs * self.outputs * self.bits / 8 + 4 * self.outputs
        return packed + self.rows * (self.inputs + self.outputs) * ITEMSIZE[dtype]

    def operations(self) -> float:
        return 2 * self.rows * self.inputs * self.outputs


def rows(batch: int, large: tuple[int, int]) -> list[Row]:
    """All rows, those that matter most first.

    Args:
      batch: images.
      large: inputs and outputs of the large matrix.
    """

    def images(operation: str, variant: str, blocks: Sequence[tuple[int, int, int, int]]):
        return [
            ImageRow(operation, variant, expansion, batch, *block)
            for expansion in EXPANSIONS
            for block in blocks
        ]

    blocks = STAGES + DOWNSAMPLING
    matrices = [
        MatrixRow("large", count, *large, bits) for bits in (1, 3, 2, 4) for count in ROWS_AT_ONCE
    ]
    # The shift by itself has no stride.
    unstrided = [(size, inputs, outputs, 1) for size, inputs, outputs, _ in blocks]
    layers = [
        MatrixRow(net, pixels, inputs, outputs, bits)
        for net, bits, products in (("wrn20_10", 1, WRN20_10), ("resnet18", 3, RESNET18))
        for pixels, inputs, outputs in products
    ]
    return [
        *images("shift_pointwise", "alone", blocks),
        *images("shift_block", "inference", blocks),
        *matrices,
        *images("shift", "", unstrided),
        *images("shift_block", "training", blocks),
        *images("shift_pointwise", "inference", blocks),
        *layers,
    ]


def to_json(row: Row) -> dict[str, Any]:
    """A row's fields."""
    assert isinstance(row, ImageRow | MatrixRow)
    return dataclasses.asdict(row)


def from_json(fields: dict[str, Any]) -> Row:
    """A row out of its fields."""
    return ImageRow(**fields) if "expansion" in fields else MatrixRow(**fields)


@functools.lru_cache(maxsize=2)
def matrix(inputs: int, outputs: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (numbers of `LEVELS`) uint8 `[inputs, outputs]`, and scales float32 `[outputs]`."""
    rng = np.random.default_rng(1)
    levels = np.array(LEVELS[bits], np.float32)
    size = 1 / math.sqrt(inputs * float(np.mean(levels**2)))
    codes = rng.integers(0, len(levels), (inputs, outputs), np.uint8)
    return codes, rng.uniform(0.5 * size, 1.5 * size, outputs).astype(np.float32)


@functools.lru_cache(maxsize=1)
def arrays(row: Row) -> dict[str, np.ndarray]:
    """What both sides compute with where they are compared, by name; images are NHWC.

    Float32; weights are scaled so that results are of order 1. A matrix is not among them: see
    `matrix`.
    """
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(scale)

    if isinstance(row, MatrixRow):
        return {"x": normal(row.rows, row.inputs)}
    assert isinstance(row, ImageRow)
    out_size = -(-row.size // row.stride)
    out = (row.batch, out_size, out_size, row.outputs)
    if row.operation != "shift_block":
        found = {"x": normal(row.batch, row.size, row.size, row.middle)}
    else:
        found = {
            "x": normal(row.batch, row.size, row.size, row.inputs),
            "w1": normal(row.inputs, row.middle, scale=row.inputs**-0.5),
            "b1": normal(row.middle, scale=0.1),
        }
    if row.operation != "shift":
        found["w2"] = normal(row.middle, row.outputs, scale=row.middle**-0.5)
    if row.variant == "inference":
        if row.operation == "shift_pointwise":
            found["scale"] = rng.uniform(0.5, 1.5, row.middle).astype(np.float32)
            found["bias"] = normal(row.middle, scale=0.1)
            found["out_scale"] = rng.uniform(0.5, 1.5, row.outputs).astype(np.float32)
        found["out_bias"] = normal(row.outputs, scale=0.1)
        if row.operation == "shift_pointwise" or not row.residual_is_input:
            found["residual"] = normal(*out)
    if row.variant == "training":
        found["dout"] = normal(*out)
    return found


def sample(values: np.ndarray) -> list[float]:
    """Values at fixed places, the same on both sides; of all of an array if it is small."""
    places = np.arange(SAMPLES, dtype=np.int64) * 2654435761 % values.size
    return values.reshape(-1)[places].astype(np.float32).tolist()


def error(row: Row, ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """The largest error of some arrays over the root mean square of ours; see `Row.by_norm`."""
    worst = 0.0
    for exact, found in zip(ours, theirs, strict=True):
        mean_square = np.square(exact, dtype=np.float64).mean()
        gaps = np.abs(np.subtract(exact, found, dtype=np.float64))
        gap = np.sqrt(np.square(gaps).mean()) if row.by_norm else gaps.max()
        relative = float(gap / np.sqrt(mean_square))
        worst = max(worst, relative if math.isfinite(relative) else math.inf)
    return worst
