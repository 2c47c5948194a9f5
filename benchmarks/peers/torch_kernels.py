"""The operations of `benchmarks.kernel_rows` in plain PyTorch, in several forms, and their worker.

A form of an operation on images is "shift/memory format/mode":

* the shift: the forms of `torch_shiftresnet`, and `index`, one gather with a mask, which a compiler
  can fuse with what is around it; `dense` folds it with the 1x1 convolution after it;
* `nchw` or `nhwc` (channels_last);
* `eager` or `compile`.

A form of a product with a matrix is "product/mode": `matmul` by the weights `[K, M]`, `linear` by
the weights `[M, K]`, both in the dtype of x, and `int4`, PyTorch's product with weights of 4 bits,
where they are such integers. Every form on CUDA is captured in a CUDA graph. Scales after a product
are folded into its weights, and channels that move the same way lie side by side.
"""

import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor

from benchmarks import kernel_rows
from benchmarks.kernel_rows import ImageRow, MatrixRow, Row
from benchmarks.peers import torch_shiftresnet as peer
from benchmarks.protocol import serve

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# As on our side: buffers go round through more than the second-level cache of the GPU.
CACHE_BYTES, MAX_BUFFERS = (64 << 20, 64) if CUDA else (16 << 20, 8)
MIN_BUFFERS = 2
GROUP_SIZE = 128  # of the int4 product
# In the order in which they are worth trying; see `forms`.
IMAGE_FORMS = (
    "dense/nhwc/compile",
    "cat/nhwc/compile",
    "index/nhwc/compile",
    "depthwise/nhwc/eager",
    "dense/nhwc/eager",
    "split/nchw/compile",
    "copy/nchw/eager",
    "depthwise/nhwc/compile",
    "cat/nchw/compile",
    "depthwise/nchw/eager",
    "index/nchw/compile",
    "copy/nhwc/eager",
    "split/nhwc/compile",
    "dense/nchw/eager",
)
MATRIX_FORMS = ("linear/eager", "matmul/eager", "int4/eager", "linear/compile", "matmul/compile")


def forms(row: Row) -> list[str]:
    """The forms of a row, those first that have been fastest."""
    if isinstance(row, MatrixRow):
        return list(MATRIX_FORMS)
    shift_alone = row.operation == "shift"
    return [form for form in IMAGE_FORMS if not (shift_alone and form.startswith("dense"))]


def shift_index(x: Tensor, stride: int, dh: Tensor, dw: Tensor) -> Tensor:
    """One gather: every value by its position, zero where that lies outside.

    Args:
      x: `[N, C, H, W]`.
      stride: in pixels.
      dh, dw: the channels' offsets, `[C, 1, 1]`.
    """
    channels, height, width = x.shape[1:]
    rows = torch.arange(0, height, stride, device=x.device)[:, None] + dh
    columns = torch.arange(0, width, stride, device=x.device) + dw
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    own = torch.arange(channels, device=x.device)[:, None, None]
    moved = x[:, own, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    return torch.where(inside, moved, 0)


SHIFTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "cat": peer.shift_cat,
    "split": peer.shift_split,
    "copy": peer.shift_copy,
}


def tensor(value: np.ndarray, dtype: str) -> Tensor:
    """On the device; images as NCHW, in whatever memory format."""
    found = torch.from_numpy(value).to(DEVICE, DTYPES[dtype])
    return found.permute(0, 3, 1, 2) if found.ndim == 4 else found


class Images(nn.Module):
    """An operation on images; its weights are parameters, `forward` takes a buffer.

    Args:
      row: what to compute.
      shift: how the shift is written.
      dtype: "float32" or "bfloat16".
    """

    def __init__(self, row: ImageRow, shift: str, dtype: str):
        super().__init__()
        self._row, self._shift = row, shift
        self.order = torch.tensor(peer.grouped_order(row.middle), device=DEVICE)
        given = {
            name: tensor(value, dtype)
            for name, value in kernel_rows.arrays(row).items()
            if value.ndim != 4
        }
        for name in ("b1", "scale", "bias"):
            self._add(name, given[name][self.order] if name in given else None)
        w1, w2 = given.get("w1"), given.get("w2")
        if w1 is not None:
            self._add("w1", w1.T[self.order, :, None, None])
        if w2 is not None:
            w2 = w2[self.order].T[..., None, None]
            if "out_scale" in given:
                w2 = w2 * given["out_scale"][:, None, None, None]
            if row.variant != "training":
                w2 = self._dense(w2) if shift == "dense" else w2
            self._add("w2", w2)
        self._add("out_bias", given.get("out_bias"))
        self.register_buffer("taps", peer.one_hot_kernels(row.middle).to(DEVICE, DTYPES[dtype]))
        sizes = torch.tensor(peer.group_sizes(row.middle))
        moves = torch.tensor(peer.OFFSETS).repeat_interleave(sizes, dim=0).to(DEVICE)
        self.register_buffer("dh", moves[:, :1, None])
        self.register_buffer("dw", moves[:, 1:, None])

    def _add(self, name: str, value: Tensor | None) -> None:
        parameter = None if value is None else nn.Parameter(value.clone().contiguous())
        self.register_parameter(name, parameter)

    def _dense(self, w2: Tensor) -> Tensor:
        return w2 * peer.one_hot_kernels(self._row.middle).to(w2).transpose(0, 1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        row, y = self._row, x
        if row.operation == "shift_block":
            y = F.relu(F.conv2d(x, self.w1, self.b1))
        if self.scale is not None:
            y = F.relu(y * self.scale[:, None, None] + self.bias[:, None, None])
        if self._shift == "dense":
            w2 = self._dense(self.w2) if row.variant == "training" else self.w2
            out = F.conv2d(y, w2, self.out_bias, row.stride, padding=1)
        else:
            if self._shift == "depthwise":
                y = F.conv2d(y, self.taps, None, row.stride, padding=1, groups=row.middle)
            elif self._shift == "index":
                y = shift_index(y, row.stride, self.dh, self.dw)
            else:
                y = SHIFTS[self._shift](y, row.stride)
            if row.operation == "shift":
                return y
            out = F.conv2d(y, self.w2, self.out_bias)
        if row.variant != "inference":
            return out
        return F.relu(out) + (x if residual is None else residual)


class ImageMeasurement:
    """One form of one row on images; see `Measurement`."""

    def __init__(self, row: ImageRow, form: str, dtype: str):
        shift, memory, mode = form.split("/")
        self._row = row
        self._format = peer.MEMORY_FORMATS[memory]
        self.module = Images(row, shift, dtype).to(memory_format=self._format)
        given = kernel_rows.arrays(row)
        self.first = [
            self._laid_out(tensor(given[name], dtype))
            for name in ("x", "residual", "dout")
            if name in given
        ]
        if row.operation != "shift_block":  # x is the expanded tensor
            self.first[0] = self._laid_out(self.first[0][:, self.module.order])
        self._trains = row.variant == "training"
        self.module.train(self._trains)
        # As in `torch_shiftresnet`: on a CPU frozen weights can be laid out beforehand.
        inductor.freezing = mode == "compile" and not CUDA and not self._trains
        compiled = torch.compile(self.module, fullgraph=True, dynamic=False)
        self._call = compiled if mode == "compile" else self.module

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self._format)

    def again(self) -> list[Tensor]:
        """Another buffer, at random."""
        return [torch.randn_like(x) for x in self.first]

    def compute(self, buffer: list[Tensor]) -> list[Tensor]:
        """The row's results."""
        if not self._trains:
            with torch.no_grad():
                return [self._call(*buffer)]
        x, dout = buffer[0].detach().requires_grad_(), buffer[1]
        out = self._call(x)
        weights = (x, self.module.w1, self.module.b1, self.module.w2)
        return [out, *torch.autograd.grad(out, weights, dout)]

    def numbers(self, results: list[Tensor]) -> list[np.ndarray]:
        """Results as ours: NHWC, channels in the originals' order."""
        found = [result.detach().float().cpu() for result in results]
        back = torch.argsort(self.module.order).cpu()
        if self._row.operation == "shift":
            found[0] = found[0][:, back]
        if self._trains:
            out, dx, dw1, db1, dw2 = found
            found = [out, dx, dw1[back, :, 0, 0].T, db1[back], dw2[:, back, 0, 0].T]
        return [(a.permute(0, 2, 3, 1) if a.ndim == 4 else a).contiguous().numpy() for a in found]


class MatrixMeasurement:
    """One form of one product; see `Measurement`."""

    def __init__(self, row: MatrixRow, form: str, dtype: str):
        kind, mode = form.split("/")
        self._row = row
        codes, scale = kernel_rows.matrix(row.inputs, row.outputs, row.bits)
        levels = np.array(kernel_rows.LEVELS[row.bits], np.int8)[codes]
        self.first = [tensor(kernel_rows.arrays(row)["x"], dtype)]
        product: Callable[..., Tensor]
        if kind == "int4":
            self.first += self._int4(levels, scale)
            product = self._int4_product
        else:
            weights = tensor(levels.astype(np.float32) * scale, dtype)
            self.first.append(weights.T.contiguous() if kind == "linear" else weights)
            product = self._linear if kind == "linear" else self._matmul
        self._call = torch.compile(product, dynamic=False) if mode == "compile" else product

    def _int4(self, levels: np.ndarray, scale: np.ndarray) -> list[Tensor]:
        if self._row.inputs % GROUP_SIZE or max(abs(levels.min()), levels.max()) > 7:
            raise ValueError("these weights are not integers of 4 bits in whole groups")
        codes = torch.from_numpy(levels.T.astype(np.int32) + 8).contiguous().to(DEVICE)
        factors = tensor(scale, "bfloat16" if CUDA else "float32")
        factors = factors.to(self.first[0].dtype)
        scales = torch.stack([factors, torch.zeros_like(factors)], dim=-1)
        scales = scales.expand(self._row.inputs // GROUP_SIZE, -1, -1).contiguous()
        if not CUDA:
            return [torch._convert_weight_to_int4pack_for_cpu(codes, 1), scales]
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        return [torch._convert_weight_to_int4pack(pairs, 8), scales]

    @staticmethod
    def _linear(x: Tensor, weights: Tensor) -> Tensor:
        return F.linear(x, weights)

    @staticmethod
    def _matmul(x: Tensor, weights: Tensor) -> Tensor:
        return x @ weights

    @staticmethod
    def _int4_product(x: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
        product = torch._weight_int4pack_mm if CUDA else torch._weight_int4pack_mm_for_cpu
        return product(x, weights, GROUP_SIZE, scales)

    def again(self) -> list[Tensor]:
        """Another buffer: x at random, the matrix at another place in memory."""
        return [torch.randn_like(self.first[0]), *(part.clone() for part in self.first[1:])]

    def compute(self, buffer: list[Tensor]) -> list[Tensor]:
        """The product."""
        with torch.no_grad():
            return [self._call(*buffer)]

    def numbers(self, results: list[Tensor]) -> list[np.ndarray]:
        """Results as ours."""
        return [result.float().cpu().numpy() for result in results]


class Measurement:
    """One form of one row on several buffers in turn.

    Args:
      row: its fields.
      form: one of `forms`.
      dtype: "float32" or "bfloat16".
    """

    def __init__(self, *, row: dict[str, Any], form: str, dtype: str):
        torch.backends.cudnn.benchmark = True
        torch._dynamo.reset()
        found = kernel_rows.from_json(row)
        self._one: ImageMeasurement | MatrixMeasurement
        if isinstance(found, MatrixRow):
            self._one = MatrixMeasurement(found, form, dtype)
        else:
            assert isinstance(found, ImageRow)
            self._one = ImageMeasurement(found, form, dtype)
        results = self._one.compute(self._one.first)
        self._check = [kernel_rows.sample(a) for a in self._one.numbers(results)]
        size = sum(t.nbytes for t in (*self._one.first, *results))
        count = min(max(-(-2 * CACHE_BYTES // size), MIN_BUFFERS), MAX_BUFFERS)
        more = [self._one.again() for _ in range(count - 1)]
        self._buffers = [self._one.first, *more]
        self._round: Callable[[], object] = self._compute_all
        if CUDA:
            self._round = self._captured()

    def _compute_all(self) -> list[list[Tensor]]:
        return [self._one.compute(buffer) for buffer in self._buffers]

    def _captured(self) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._compute_all()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._results = self._compute_all()
        return graph.replay

    def check(self, steps: int) -> list[list[float]]:
        """Values at fixed places of each result of the first buffer; `steps` plays no part."""
        return self._check

    def run(self, steps: int) -> float:
        """Runs about so many operations to the end of the device's work; seconds of each."""
        rounds = -(-steps // len(self._buffers))
        start = time.perf_counter()
        for _ in range(rounds):
            if CUDA:
                self._round()
            else:  # a result's memory is free for the next, as on our side
                for buffer in self._buffers:
                    self._one.compute(buffer)
        if CUDA:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / (rounds * len(self._buffers))


def describe() -> dict[str, Any]:
    """Versions and device, for the report."""
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "threads": torch.get_num_threads(),
    }


def forms_of(*, row: dict[str, Any]) -> list[str]:
    """`forms`, for a row's fields."""
    return forms(kernel_rows.from_json(row))


if __name__ == "__main__":
    serve(Measurement, describe=describe, forms=forms_of)
