"""A network as an ONNX program, by jax2onnx."""

import json
import logging
from collections.abc import Sequence

from flax import nnx

from shiftnet.data import RGB
from shiftnet.interchange.stablehlo import images, program
from shiftnet.models.network import Network


def onnx(network: nnx.Module, mean: RGB, std: RGB, size: int, class_names: Sequence[str]) -> bytes:
    """Serialises an ONNX program, which needs jax2onnx.

    Its input is `images`, uint8 `[batch, size, size, 3]`, its output `logits`, float32
    `[batch, classes]`; it computes in float32 whatever the network was trained in, since hardly any
    runtime has convolutions in bfloat16. Its metadata hold `class_names`, a JSON list.

    Args:
      network: a trained one; changed in place.
      mean, std: of each channel, for pixels in [0, 1].
      size: height and width of the images, in pixels.
      class_names: by class number.
    """
    import jax2onnx

    # Dozens of warnings about the types of values between operations, which no reader needs.
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    if isinstance(network, Network):
        network.dtype = None
    model = jax2onnx.to_onnx(
        program(network, mean, std, platform="onnx"),
        [images(size)],
        model_name="shiftnet",
        input_names=["images"],
        output_names=["logits"],
    )
    entry = model.metadata_props.add()
    entry.key, entry.value = "class_names", json.dumps(list(class_names))
    return model.SerializeToString()
