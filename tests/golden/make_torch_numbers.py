"""Writes torch.json, PyTorch's own numbers for optimizers, schedules and losses.

Run once, where PyTorch is installed: `python tests/golden/make_torch_numbers.py`. The tests read
the numbers and need no PyTorch.
"""

import json
import platform
from pathlib import Path

import torch

STEPS = 6


def main() -> None:
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=generator)
    gradients = torch.randn(STEPS, 4, 3, generator=generator)
    numbers = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "start": start.tolist(),
        "gradients": gradients.tolist(),
        "optimizers": {},
        "schedules": schedules(),
        "losses": losses(generator),
        "ema": ema(),
        "update_bn": update_bn(),
    }
    recipes = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        "sgd_nesterov": lambda p: torch.optim.SGD(
            p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True
        ),
        "adamw": lambda p: torch.optim.AdamW(
            p, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
        ),
    }
    for name, make in recipes.items():
        numbers["optimizers"][name] = trajectory(make, start, gradients)
    # In bfloat16, of a matrix [out, in]; without momentum, which optax averages in another way.
    muon = trajectory(
        lambda p: torch.optim.Muon(
            p, lr=0.1, momentum=0.0, weight_decay=0.01, adjust_lr_fn="original"
        ),
        start.T,
        gradients.transpose(1, 2),
    )
    numbers["optimizers"]["muon"] = torch.tensor(muon).transpose(1, 2).tolist()
    numbers["optimizers"]["clipped"] = trajectory(recipes["sgd"], start, gradients, clip_norm=0.5)
    numbers["optimizers"]["accumulated"] = trajectory(
        recipes["sgd"], start, gradients, accumulate=2
    )
    Path(__file__).with_name("torch.json").write_text(json.dumps(numbers) + "\n")


def trajectory(make, start, gradients, *, clip_norm=None, accumulate=1):
    parameter = torch.nn.Parameter(start.clone())
    optimizer = make([parameter])
    values = []
    for step, gradient in enumerate(gradients, 1):
        summed = gradient / accumulate
        parameter.grad = summed if parameter.grad is None else parameter.grad + summed
        if step % accumulate == 0:
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_([parameter], clip_norm)
            optimizer.step()
            parameter.grad = None
        values.append(parameter.detach().tolist())
    return values


def losses(generator):
    """Losses of four images and their gradients to the logits."""
    logits = (3 * torch.randn(4, 5, generator=generator)).requires_grad_()
    teacher = 4 * torch.randn(4, 5, generator=generator)
    labels = torch.tensor([2, 0, 4, 1])
    functional = torch.nn.functional

    def divergence(student, teacher, temperature):
        return temperature**2 * functional.kl_div(
            functional.log_softmax(student / temperature, 1),
            functional.softmax(teacher / temperature, 1),
            reduction="batchmean",
        )

    def standardized(logits):  # the code published with arXiv:2403.01427
        return (logits - logits.mean(-1, keepdims=True)) / (1e-7 + logits.std(-1, keepdims=True))

    found = {
        "cross_entropy": functional.cross_entropy(logits, labels),
        "smoothed": functional.cross_entropy(logits, labels, label_smoothing=0.1),
        "weighted": functional.cross_entropy(
            logits, labels, weight=1.0 / (1 + torch.arange(logits.shape[1]))
        ),
        "soft_targets": functional.cross_entropy(logits, torch.softmax(teacher, 1)),
        "distillation": divergence(logits, teacher, 4.0),
        "standardized": divergence(standardized(logits), standardized(teacher), 2.0),
    }
    return {
        "logits": logits.tolist(),
        "teacher": teacher.tolist(),
        "labels": labels.tolist(),
        **{
            name: {
                "loss": loss.item(),
                "gradient": torch.autograd.grad(loss, logits)[0].tolist(),
            }
            for name, loss in found.items()
        },
    }


def ema():
    """Averages of a parameter and a buffer, with a decay of 0.75, after each of five updates."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(5, 2, 3, generator=generator)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros(3))
    module.register_buffer("mean", torch.zeros(3))
    swa = torch.optim.swa_utils
    average = swa.AveragedModel(
        module, multi_avg_fn=swa.get_ema_multi_avg_fn(0.75), use_buffers=True
    )
    averages = []
    for weight, mean in values:
        module.weight.data, module.mean = weight.clone(), mean.clone()
        average.update_parameters(module)
        averages.append([average.module.weight.tolist(), average.module.mean.tolist()])
    return {"values": values.tolist(), "averages": averages}


def update_bn():
    """Statistics of two batch norms behind 1x1 convolutions, estimated on three batches of two."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (3, 2, 3, 2, 2), generator=generator)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 5, 1, bias=False),
        torch.nn.BatchNorm2d(5),
    )
    for conv in (network[0], network[3]):
        conv.weight.data = torch.randn(conv.weight.shape, generator=generator)
    torch.optim.swa_utils.update_bn([(batch / 255 - 0.5) / 0.25 for batch in images], network)
    return {
        "images": images.tolist(),
        "weights": [conv.weight[:, :, 0, 0].tolist() for conv in (network[0], network[3])],
        "means": [norm.running_mean.tolist() for norm in (network[1], network[4])],
        "vars": [norm.running_var.tolist() for norm in (network[1], network[4])],
    }


def schedules():
    """Rates of 40 steps: 8 epochs of 5."""

    def rates(make):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
        scheduler = make(optimizer)
        found = []
        for _ in range(40):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    lr = torch.optim.lr_scheduler
    return {
        # PyTorch's cycle ends with its last step, optax's one step later; the peak is at step 12.
        "onecycle": rates(
            lambda o: lr.OneCycleLR(o, 0.2, total_steps=41, pct_start=13 / 41, cycle_momentum=False)
        ),
        "cosine": rates(lambda o: lr.CosineAnnealingLR(o, 40, eta_min=0.01)),
        "linear": rates(lambda o: lr.LinearLR(o, 1.0, 0.05, total_iters=40)),
        "step": rates(lambda o: lr.MultiStepLR(o, [10, 25], 0.1)),
        # 2 epochs of warm-up, then a cosine over the other 6.
        "warmup_cosine": rates(
            lambda o: lr.SequentialLR(
                o,
                [lr.LinearLR(o, 0.1, 1.0, total_iters=9), lr.CosineAnnealingLR(o, 30, eta_min=0.0)],
                [10],
            )
        ),
    }


if __name__ == "__main__":
    main()
