"""Cards: what a trained network is, in Markdown, from its result file and from the network."""

import collections
import json
import re
import shlex
import statistics
from typing import Any

from flax import nnx

from shiftnet import models, quantizers, results, tables
from shiftnet.data import described
from shiftnet.errors import printable
from shiftnet.inference import Classifier
from shiftnet.models.counting import count
from shiftnet.zoo.index import Model

# Data set -> its name on the hub, and what there is to say of where it comes from.
DATA = {
    "cifar10": (
        "uoft-cs/cifar10",
        "CIFAR-10 (A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009): "
        "50,000 training and 10,000 test images of 32x32 pixels. It is published for research, "
        "without a licence of its own",
    ),
    "cifar100": (
        "uoft-cs/cifar100",
        "CIFAR-100 (A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009): "
        "50,000 training and 10,000 test images of 32x32 pixels. It is published for research, "
        "without a licence of its own",
    ),
    "imagenet2012": (
        "ILSVRC/imagenet-1k",
        "ImageNet (ILSVRC 2012): 1,281,167 training and 50,000 validation images. Its terms allow "
        "research that is not commercial",
    ),
    "digits": (
        "",
        "Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak, UCI Machine Learning "
        "Repository, CC BY 4.0)",
    ),
}
LICENSE = "apache-2.0"  # of this project, the networks that it trained included


def card(name: str, model: Classifier, size: int, info: Model | None) -> str:
    """Returns the card of a network.

    Args:
      name: its title.
      model: the network.
      size: of its file in bytes.
      info: its numbers, for a trained network of this project; None for others.
    """
    own = info is not None
    sections = {
        f"# {name}": _what(model, size),
        "## Accuracy": _accuracy(info) if info else "It is not known here: evaluate it, see below.",
        "## Use": _use(name, own=own),
        "## Input": _input(model),
        "## Training": _training(model, info),
        "## Data and licence": _data(model, own=own),
        "## Limits": _limits(model, info),
        "## Classes": ", ".join(map(_plain, model.class_names)) + ".",
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items()) + "\n"


def _plain(name: str) -> str:
    """Returns a name that Markdown shows as it is."""
    return re.sub(r"[\\`*<>|\[\]]", r"\\\g<0>", printable(name))


def front_matter(name: str, model: Classifier, info: Model | None) -> str:
    """Returns the metadata that the hub reads, as YAML between two lines of dashes.

    It is written as JSON, of which YAML is a superset, key by key.
    """
    form = model.config.model.weights
    dataset = model.config.data.name if model.config.data.source == "tfds" else ""
    hub_name, _ = DATA.get(dataset, ("", ""))
    fields: dict[str, Any] = {
        "library_name": "shiftnet",
        "pipeline_tag": "image-classification",
        "tags": ["jax", "flax", "shift", *([] if form == "float" else [form, "low-bit"])],
    }
    if hub_name:
        fields["datasets"] = [hub_name]
    if info:
        fields["license"] = LICENSE
        fields["metrics"] = ["accuracy"]
        accuracy = {"type": "accuracy", "name": "top-1", "value": round(info.accuracy / 100, 6)}
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": info.dataset, "type": hub_name or info.dataset, "split": "test"},
            "metrics": [accuracy],
        }
        fields["model-index"] = [{"name": name, "results": [result]}]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---", "", ""])


def _what(model: Classifier, size: int) -> str:
    recipe = model.config.model
    side = model.preprocess.size
    network = _as_trained(model)
    counts = count(network, (side, side, 3))
    fields = {
        field: recipe[field] for field in ("expansion", "reduction", "width") if recipe[field] != 1
    }
    details = "".join(f", {field} {value:g}" for field, value in fields.items())
    if recipe.reduction != 1:
        details += f" by {recipe.reduction_mode}"
    weights = "float weights"
    if low := _low_bit(network):
        layers = len(quantizers.of_layers(network))
        rest = "; the other layers' stay float" if sum(low.values()) < layers else ""
        kinds = [f"{kind} weights in {number} layers" for kind, number in low.items()]
        weights = f"{' and '.join(kinds)}{rest}"
    return (
        f"A {recipe.arch}{details}, with {weights}. It sorts images of {side}x{side} pixels into "
        f"{len(model.class_names)} classes.\n\n"
        f"{counts.parameters:,} parameters, {counts.multiply_adds:,} multiply-adds per image; "
        f"the file has {size:,} bytes. It is a JAX/Flax NNX network of the package `shiftnet`."
    )


def _as_trained(model: Classifier) -> nnx.Module:
    """Returns a network without numbers as it was trained.

    A packed file's layers have levels and codes, whatever form they were trained in, and its batch
    norms are folded.
    """
    recipe, classes = model.config.model, len(model.class_names)
    return nnx.eval_shape(lambda: models.build(recipe, classes, rngs=nnx.Rngs(0)))


def _low_bit(network: nnx.Module) -> dict[str, int]:
    """Returns how many layers have each kind of low-bit weights, such as `3-bit s3`."""
    names = {made: name for name, (made, _) in quantizers.FORMS.items()}
    forms = quantizers.of_layers(network).values()
    return collections.Counter(
        f"{form.bits}-bit {names[type(form)]}"
        for form in forms
        if isinstance(form, quantizers.LowBitWeight)
    )


def _accuracy(info: Model) -> str:
    kept, runs = info.result["checkpoint"], info.result["runs"]
    images = sum(entry[2] for entry in kept["confusion"])
    device = f", computed in float32 on {kept['device']}" if kept.get("device") else ""
    lines = [
        f"**{info.accuracy:.2f} % top-1** on the {images:,} test images of {info.dataset}: this "
        f"file (seed {kept['seed']}, epoch {kept['epoch']}){device}."
    ]
    for epoch in results.EPOCHS:
        values = results.accuracies(info.result, epoch)
        words = "best epoch on the test images" if epoch == "best" else "last epoch"
        lines.append(
            f"- After the {words}: {results.mean_and_spread(values)} % over {len(runs)} "
            f"seed{'s' if len(runs) > 1 else ''}"
            + (f" ({', '.join(f'{value:.2f}' for value in values)})." if len(runs) > 1 else ".")
        )
    if info.reported is not None:
        spread = "" if info.row.spread is None else f" ± {info.row.spread:.2f}"
        lines.append(f"- Reported: {info.reported:.2f}{spread} % ({info.table.source}).")
    if info.row.note and not info.stand_in:  # notes are of the row's own recipe
        lines.append(f"- {info.row.note}")
    return "\n".join([lines[0], "", *lines[1:]])


def _use(name: str, *, own: bool) -> str:
    where = "" if own else "  # this folder; or hf://OWNER/NAME where it was uploaded"
    word = shlex.quote(name)
    return f"""\
```python
import shiftnet

model = shiftnet.load({json.dumps(name, ensure_ascii=False)}){where}
model.predict(["cat.jpg", "dog.jpg"]).top(3)
```

```
shiftnet predict {word} cat.jpg
shiftnet evaluate --ckpt {word}
```"""


def _input(model: Classifier) -> str:
    pre = model.preprocess
    return (
        f"RGB images: the shorter side is resized to {pre.resize} pixels, the middle "
        f"{pre.size}x{pre.size} is taken, and pixels in [0, 1] are normalized with mean "
        f"{_numbers(pre.mean)} and standard deviation {_numbers(pre.std)}. `predict` does all of "
        "that."
    )


def _training(model: Classifier, info: Model | None) -> str:
    if info is None:
        recipe, steps = model.config, model.metadata.get("step")
        if origin := model.metadata.get("converted_from"):
            return f"It is not known here: the network was converted from {origin['file']}."
        if not steps:
            return "It is not known here."
        return (
            f"{steps:,} steps, by a recipe of {recipe.epochs} epochs of {recipe.optimizer.name}, "
            f"batch {recipe.batch_size}; all of it is in the file and in `config.json`."
        )
    result, runs = info.result, info.result["runs"]
    devices = ", ".join(dict.fromkeys(name for run in runs for name in results.devices(run)))
    seconds = statistics.fmean(run["seconds"] / run["together"] for run in runs)
    known = dict.fromkeys(name for run in runs for name in results.commits(run))
    commits = ", ".join(f"`{_short(name)}`" for name in known)
    seeds = max(run["seed"] for run in runs) + 1
    stand_in = f" --recipe {info.stand_in}" if info.stand_in else ""
    begun = info.row.init and not info.stand_in
    start = f", started from {info.row.init}" if begun else ""
    if teacher := model.config.distill.teacher:
        start += f", learning from {teacher}"
    return (
        f"Recipe `{info.recipe}`, {result['epochs']} epochs{start}; about "
        f"{tables.duration(seconds)} per seed on {devices}"
        + (f", commit{'s' if len(known) > 1 else ''} {commits}" if commits else "")
        + ". In a checkout of the code, this trains it again:\n\n"
        f"```\npython -m shiftnet reproduce --only {info.row.name}{stand_in} --seeds {seeds}\n```"
    )


def _data(model: Classifier, *, own: bool) -> str:
    data = model.config.data
    known = data.source == "tfds" and data.name in DATA
    source = DATA[data.name][1] if known else f"{described(data)}, from the person who trained it"
    licence = (
        "The network is under the Apache License 2.0, as the code that made it is."
        if own
        else "The person who trained it says under which licence it is."
    )
    return f"{source}. {licence}"


def _limits(model: Classifier, info: Model | None) -> str:
    side = model.preprocess.size
    lines = [
        "- It knows only the classes below and always names one of them, for an image of anything "
        "else too; probabilities are not calibrated.",
        f"- It was made for images of {side}x{side} pixels; details of larger ones are lost.",
    ]
    if info and info.epoch == "best":
        lines.append(
            "- The epoch was chosen on the test images, as in the original, so the accuracy is "
            "slightly optimistic; the one after the last epoch is not."
        )
    if info:
        lines.append(
            "- What is float in the file is in float16. Devices that round the factors of "
            "float32 products (to TF32 or bfloat16) may classify a few test images otherwise."
        )
    return "\n".join(lines)


def _numbers(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _short(commit: str) -> str:
    commit, _, changed = commit.partition("-")
    return commit[:10] + (f"-{changed}" if changed else "")
