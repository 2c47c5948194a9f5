"""ShiftResNet in plain PyTorch, in several forms, and the worker that times one of them.

The same net as `shiftnet.models` builds (arXiv:1711.08141): 1x1 convolution, batch norm, ReLU,
shift, 1x1 convolution, batch norm, ReLU, plus the shortcut. It is here to be as fast as PyTorch
allows, so what a form changes is only how the same numbers are computed:

* `SHIFTS`: how the shift is written;
* the memory format: `nchw` (contiguous) or `nhwc` (channels_last);
* `eager`, `compile` (`torch.compile`), and on CUDA `graphs` (`mode="reduce-overhead"`).

In every form the channels that move the same way lie side by side. The originals assign
directions round robin (channel mod 9); the weights are permuted once on loading, which gives the
same network and lets a group be a slice. For inference the batch norms are folded into the
convolutions, as PyTorch's own `fuse_conv_bn_eval` does.
"""

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor import freezing
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.protocol import serve

Rectangle = tuple[slice, slice]  # rows, columns

OFFSETS = [(group // 3 - 1, group % 3 - 1) for group in range(9)]  # (dh, dw) of a group
CENTRE = 4


def group_sizes(channels: int) -> list[int]:
    """Channels in each of the nine groups; what nine does not divide stays, with the centre."""
    sizes = [channels // 9] * 9
    sizes[CENTRE] += channels % 9
    return sizes


def grouped_order(channels: int) -> list[int]:
    """For each place in the grouped layout, the channel's number in the originals' layout."""
    whole = channels // 9 * 9
    order: list[int] = []
    for group in range(9):
        order += range(group, whole, 9)
        if group == CENTRE:
            order += range(whole, channels)
    return order


def window(offset: int, length: int, stride: int) -> tuple[slice, slice]:
    """(to, from): out[to] = in[from] is out[i] = in[stride * i + offset] where that exists."""
    low = -(-max(0, -offset) // stride)
    high = min((length - 1 - offset) // stride + 1, -(-length // stride))
    first = stride * low + offset
    return slice(low, high), slice(first, first + stride * (high - low), stride)


# How a shift may be written: [N, C, H, W], C in the grouped layout -> every stride-th pixel of the
# shifted tensor, out[n, c, i, j] = x[n, c, stride * i + dh, stride * j + dw], zero outside.


def shift_cat(x: Tensor, stride: int) -> Tensor:
    """The plain form: pad once, one slice a group, concatenate."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    parts, first = [], 0
    for size, (dh, dw) in zip(group_sizes(x.shape[1]), OFFSETS, strict=True):
        rows = slice(1 + dh, 1 + dh + height, stride)
        columns = slice(1 + dw, 1 + dw + width, stride)
        parts.append(padded[:, first : first + size, rows, columns])
        first += size
    return torch.cat(parts, 1)


def shift_split(x: Tensor, stride: int) -> Tensor:
    """Split, pad each group by (-d, d), which crops one side and fills the other, concatenate.

    Autograd's slices add up nine full-size gradients; a split has one concatenation instead.
    """
    groups = x.split(group_sizes(x.shape[1]), 1)
    moved = [
        F.pad(group, (-dw, dw, -dh, dh))[:, :, ::stride, ::stride]
        for group, (dh, dw) in zip(groups, OFFSETS, strict=True)
        if group.shape[1]
    ]
    return torch.cat(moved, 1)


class _CopyShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        ctx.stride, ctx.input_shape = stride, x.shape
        height, width = (-(-size // stride) for size in x.shape[2:])
        out = _zeros_like(x, torch.Size((*x.shape[:2], height, width)))
        for group, to, source in _windows(x.shape, stride):
            out[:, group, *to] = x[:, group, *source]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out = _zeros_like(gradient, ctx.input_shape)
        for group, to, source in _windows(ctx.input_shape, ctx.stride):
            out[:, group, *source] = gradient[:, group, *to]
        return out, None


def _zeros_like(x: Tensor, shape: torch.Size) -> Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    return out.zero_()


def _windows(shape: torch.Size, stride: int) -> Iterator[tuple[slice, Rectangle, Rectangle]]:
    """A group's channels, where its pixels go and where they come from; shape is the input's."""
    first = 0
    for size, (dh, dw) in zip(group_sizes(shape[1]), OFFSETS, strict=True):
        rows, from_rows = window(dh, shape[2], stride)
        columns, from_columns = window(dw, shape[3], stride)
        yield slice(first, first + size), (rows, columns), (from_rows, from_columns)
        first += size


def shift_copy(x: Tensor, stride: int) -> Tensor:
    """One slice assignment a group into zeros, forward and (written out) backward."""
    return _CopyShift.apply(x, stride)


def one_hot_kernels(channels: int) -> Tensor:
    """Float32 [channels, 1, 3, 3]: a one where each channel of the grouped layout reads."""
    kernels = torch.zeros(channels, 1, 9)
    groups = torch.arange(9).repeat_interleave(torch.tensor(group_sizes(channels)))
    kernels[torch.arange(channels), 0, groups] = 1
    return kernels.reshape(channels, 1, 3, 3)


SHIFTS = ("depthwise", "dense", "cat", "split", "copy")
MEMORY_FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


class ShiftedPointwise(nn.Conv2d):
    """Shift, then the 1x1 convolution with the stride; its weight is the 1x1 convolution's.

    `depthwise` shifts by a 3x3 depthwise convolution with one-hot kernels; `dense` writes the two
    as one 3x3 convolution whose kernels have a single non-zero tap an input channel: nine times the
    arithmetic and no shifted tensor.
    """

    def __init__(self, channels: int, features: int, stride: int, form: str):
        super().__init__(channels, features, 1, bias=False)
        self.step, self.form = stride, form
        self.dense_weight: Tensor | None  # for inference, expanded once
        self.register_buffer("dense_weight", None, persistent=False)
        self.register_buffer("taps", one_hot_kernels(channels), persistent=False)

    def expanded(self) -> Tensor:
        """The weight of the `dense` form, [features, channels, 3, 3]."""
        return self.weight * self.taps.transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "dense":
            weight = self.expanded() if self.dense_weight is None else self.dense_weight
            return F.conv2d(x, weight, self.bias, self.step, padding=1)
        if self.form == "depthwise":
            taps = self.taps.to(x.dtype)
            shifted = F.conv2d(x, taps, None, self.step, padding=1, groups=x.shape[1])
        else:
            shift = {"cat": shift_cat, "split": shift_split, "copy": shift_copy}[self.form]
            shifted = shift(x, self.step)
        return F.conv2d(shifted, self.weight, self.bias)


class Block(nn.Module):
    """1x1 -> BN -> ReLU -> shift -> 1x1 -> BN -> ReLU, plus the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: float, form: str):
        super().__init__()
        middle = int(outputs * expansion)
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(middle)
        self.conv2 = ShiftedPointwise(middle, outputs, stride, form)
        self.bn2: nn.Module = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return y + self.shortcut(x)


class ShiftResNet(nn.Module):
    """The net, any depth 6n + 2: [N, 3, H, W] to logits, H and W multiples of 4 up to 32."""

    def __init__(self, depth: int, expansion: float, num_classes: int, form: str):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(16)
        inputs = 16
        for stage, outputs in enumerate((16, 32, 64), 1):
            blocks = []
            for index in range((depth - 2) // 6):
                stride = 2 if stage > 1 and index == 0 else 1
                blocks.append(Block(inputs, outputs, stride, expansion, form))
                inputs = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Takes weights under the original's state-dict names, channels in the original's order."""
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
        for name, block in self.named_modules():
            if isinstance(block, Block):
                order = grouped_order(block.conv2.in_channels)
                for key in ("conv1.weight", *(f"bn1.{key}" for key in BATCH_NORM_KEYS)):
                    tensors[f"{name}.{key}"] = tensors[f"{name}.{key}"][order]
                tensors[f"{name}.conv2.weight"] = tensors[f"{name}.conv2.weight"][:, order]
        missing, unexpected = self.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise ValueError(f"the nets differ: missing {missing}, unexpected {unexpected}")

    def fold(self) -> None:
        """For inference: batch norms into the convolutions before them, dense weights expanded."""
        for module in [self, *(block for block in self.modules() if isinstance(block, Block))]:
            for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
                if hasattr(module, conv):
                    fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
                    setattr(module, conv, fused)
                    setattr(module, norm, nn.Identity())
            if isinstance(module, Block):
                if len(module.shortcut):
                    fused = fuse_conv_bn_eval(module.shortcut[0], module.shortcut[1])
                    module.shortcut = nn.Sequential(fused)
                if module.conv2.form == "dense":
                    module.conv2.dense_weight = module.conv2.expanded().detach()


BATCH_NORM_KEYS = ("weight", "bias", "running_mean", "running_var")


def forms(device: str, ways: Iterable[str] = SHIFTS) -> list[str]:
    """Every form there is on `device` ("cpu" or "cuda"), as "way/memory format/mode".

    Those that promise most come first: time may not be enough for all.
    """
    modes = ("compile", "eager") if device == "cpu" else ("graphs", "compile", "eager")
    return [f"{a}/{b}/{c}" for c in modes for a in ways for b in MEMORY_FORMATS]


class Measurement:
    """One form of one task on one batch.

    Attributes:
      build: builds the net from `net` and the first part of a form.
      load: gives it weights under our names.
      fold: makes it ready for inference.

    Args:
      task: "training" or "inference".
      form: one of `forms`.
      net: `depth`, `expansion`, `num_classes`.
      optimizer: of SGD: `lr`, `momentum`, `weight_decay`.
      dtype: "float32", or "bfloat16" for autocast to it with float32 parameters.
      tf32: whether float32 products on CUDA may round their inputs to TF32.
      data: path of an .npz with `sd/<name>` weights, `images` [N, H, W, 3] and `labels` [N].
    """

    build: Callable[..., Any] = ShiftResNet
    load: Callable[..., None] = ShiftResNet.load
    fold: Callable[..., None] = ShiftResNet.fold

    def __init__(
        self,
        *,
        task: str,
        form: str,
        net: dict[str, Any],
        optimizer: dict[str, float],
        dtype: str,
        tf32: bool,
        data: str,
    ):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cudnn.benchmark = True
        if device == "cuda":  # on the CPU the settings stay PyTorch's own
            torch.backends.cudnn.allow_tf32 = tf32
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
        shift, memory, mode = form.split("/")
        memory_format = MEMORY_FORMATS[memory]

        with np.load(data) as arrays:
            weights = {name[3:]: arrays[name] for name in arrays if name.startswith("sd/")}
            images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
            self._labels = torch.from_numpy(arrays["labels"]).long().to(device)
        self._images = images.to(device).contiguous(memory_format=memory_format)
        self._net = self.build(**net, form=shift)
        type(self).load(self._net, weights)
        self._net.to(device).to(memory_format=memory_format)

        half = dtype == "bfloat16"
        self._autocast: Callable[[], AbstractContextManager] = (
            (lambda: torch.autocast(device, torch.bfloat16)) if half else nullcontext
        )
        self._task, self._freezes = task, False
        compiled = self._compiler(mode, task, device)
        if task == "training":
            self._net.train()
            self._loss = compiled(self._forward_loss)
            self._optimizer = torch.optim.SGD(self._net.parameters(), **optimizer, fused=True)
        else:
            self._net.eval()
            type(self).fold(self._net)
            if half:  # autocast would convert the weights again at every call
                self._net.to(torch.bfloat16)
                self._images, self._autocast = self._images.to(torch.bfloat16), nullcontext
            self._logits = compiled(self._forward)

    def _compiler(self, mode: str, task: str, device: str) -> Callable[[Callable], Callable]:
        if mode == "eager":
            return lambda function: function
        if mode == "graphs":
            return torch.compile(mode="reduce-overhead", fullgraph=True, dynamic=False)
        # Freezing makes the weights constants, which lets the CPU lay them out beforehand. Given
        # as an option of torch.compile it does nothing and says nothing: tracing reads this one.
        self._freezes = task == "inference" and device == "cpu"
        inductor.freezing = self._freezes
        return torch.compile(fullgraph=True, dynamic=False)

    def _forward(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self._net(images)

    def _forward_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            return F.cross_entropy(self._net(images).float(), labels)

    def _train_step(self) -> Tensor:
        loss = self._loss(self._images, self._labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def check(self, steps: int) -> list[float]:
        """The losses of the first `steps` training steps, or the logits of the batch in a row."""
        if self._task == "training":
            return [self._train_step().item() for _ in range(steps)]
        with (
            torch.inference_mode(),
            mock.patch.object(freezing, "freeze", wraps=freezing.freeze) as freeze,
        ):
            logits = self._logits(self._images)
        if self._freezes and not freeze.called:
            raise RuntimeError("torch.compile did not freeze the weights: not its best form")
        return logits.float().cpu().flatten().tolist()

    def run(self, steps: int) -> float:
        """Runs `steps` steps to the end of the device's work; returns the seconds of each."""
        start = time.perf_counter()
        if self._task == "training":
            for _ in range(steps):
                self._train_step()
        else:
            with torch.inference_mode():
                for _ in range(steps):
                    self._logits(self._images)
        if self._images.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps


def describe(ways: Iterable[str] = SHIFTS) -> dict[str, Any]:
    """Versions, device and forms, for the report."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "forms": forms("cuda" if cuda else "cpu", ways),
    }


if __name__ == "__main__":
    serve(Measurement, describe=describe)
