"""The originals' networks in evaluation, restated in plain PyTorch over a state dict."""

import math

import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]


def _bn(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)


def _conv(weight: torch.Tensor, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def _blocks(state: State, stage: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{stage}.")})


def _shift(x: torch.Tensor) -> torch.Tensor:
    """Channel c of those that 9 divides reads its neighbour by (c // 3 % 3 - 1, c % 3 - 1)."""
    _, channels, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    moved = x.clone()
    for c in range(channels // 9 * 9):
        dh, dw = c // 3 % 3, c % 3
        moved[:, c] = padded[:, c, dh : dh + height, dw : dw + width]
    return moved


def shiftresnet(state: State, x: torch.Tensor) -> torch.Tensor:
    """ShiftResNet: logits of normalised `[N, 3, 32, 32]`."""
    x = F.relu(_bn(state, "bn1", _conv(state["conv1.weight"], x)))
    for stage in ("layer1", "layer2", "layer3"):
        for block in range(_blocks(state, stage)):
            at = f"{stage}.{block}"
            stride = 2 if block == 0 and stage != "layer1" else 1
            y = F.relu(_bn(state, f"{at}.bn1", _conv(state[f"{at}.conv1.weight"], x)))
            y = _conv(state[f"{at}.conv2.weight"], _shift(y), stride)
            y = F.relu(_bn(state, f"{at}.bn2", y))
            if f"{at}.shortcut.0.weight" in state:
                x = _bn(
                    state, f"{at}.shortcut.1", _conv(state[f"{at}.shortcut.0.weight"], x, stride)
                )
            x = y + x
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def wrn(state: State, x: torch.Tensor) -> torch.Tensor:
    """The 1-bit wide ResNet: logits of normalised `[N, 3, 32, 32]`."""

    def binary(latent: torch.Tensor) -> torch.Tensor:
        signs = torch.where(latent >= 0, 1.0, -1.0).to(latent.dtype)
        return math.sqrt(2 / latent[0].numel()) * signs

    x = _conv(state["conv0"], x)
    for group in ("group0", "group1", "group2"):
        for block in range(_blocks(state, group)):
            at = f"{group}.block{block}"
            stride = 2 if block == 0 and group != "group0" else 1
            y = _conv(binary(state[f"{at}.conv0"]), F.relu(_bn(state, f"{at}.bn0", x)), stride)
            y = _conv(binary(state[f"{at}.conv1"]), F.relu(_bn(state, f"{at}.bn1", y)))
            if stride == 2:
                x = F.avg_pool2d(x, 3, stride=2, padding=1)
                x = torch.cat([x, torch.zeros_like(x)], 1)
            x = x + y
    x = F.relu(_bn(state, "bn", x))
    return _bn(state, "bn_last", _conv(state["conv_last"], x)).mean((2, 3))


def s3_resnet(state: State, x: torch.Tensor) -> torch.Tensor:
    """S3's CIFAR ResNet from its latents: logits of normalised `[N, 3, 32, 32]`."""

    def low_bit(name: str) -> torch.Tensor:
        a, b, c, d = (state[f"{name}{end}"] for end in ("", "_val", "_shift", "_shift2"))
        sign = torch.where(a >= 0, 1.0, -1.0).to(x.dtype)
        shift = (c > 0).to(x.dtype) * ((d > 0).to(x.dtype) + 1)
        return sign * (b > 0).to(x.dtype) * 2**shift

    x = F.relu(_bn(state, "bn1", _conv(state["conv1.weight"], x)))
    for stage in ("layer1", "layer2", "layer3"):
        for block in range(_blocks(state, stage)):
            at = f"{stage}.{block}"
            stride = 2 if block == 0 and stage != "layer1" else 1
            y = F.relu(_bn(state, f"{at}.bn1", _conv(low_bit(f"{at}.conv1.weight"), x, stride)))
            y = _bn(state, f"{at}.bn2", _conv(low_bit(f"{at}.conv2.weight"), y))
            if f"{at}.downsample.0.weight" in state:
                x = _conv(low_bit(f"{at}.downsample.0.weight"), x, stride)
                x = _bn(state, f"{at}.downsample.1", x)
            x = F.relu(x + y)
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])
