"""Operations: differentiation, sharding over devices, and selection of an implementation.

To add one, make a folder `kernels/NAME/` with

    xla.py       the reference: `forward(*operands, **settings)` in plain XLA, NHWC, any arguments
    cpu.py, tpu.py, gpu.py, for the platforms that have a kernel:
                 `forward(*operands, **settings)`, which may also take an `Epilogue`'s arguments,
                 `backward(*operands, dout, **settings)`, the gradients of all operands, and
                 `unsupported(*operands, backward, **settings)`, the reason in one clause, or None
    __init__.py  NAME = the public function: its docstring and checks; it ends in a call of
                 OPERATION = Operation("NAME", xla.forward, {"cpu": Kernel(...), ...}, ...)

Nothing else is needed: the reference is differentiated by `jax.vjp`, second derivatives are those
of the reference, a kernel in HWCN states its layout, and `cases` are what `selftest` runs on a
device before its first use. `with choices() as seen` collects which implementations are selected,
and why, while programs are traced.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from shiftnet.kernels import implementations, selftest
from shiftnet.kernels.implementations import Division
from shiftnet.kernels.layouts import Layout, affine, from_nhwc, to_nhwc

OPERATIONS: dict[str, "Operation"] = {}  # all that were imported, by name

_LOWERED = {"cpu": "cpu", "tpu": "tpu", "gpu": "cuda"}  # as `jax.lax.platform_dependent` has them
_seen: ContextVar[list[str] | None] = ContextVar("_seen", default=None)


@contextlib.contextmanager
def choices() -> Iterator[list[str]]:
    """Collects which implementations operations select in programs traced in this context.

    Programs that were traced before it add nothing.

    Yields:
      A list that grows by lines such as "shift_block: cpu" or "shift: xla, since it has no cpu
      kernel", each of them once.
    """
    seen: list[str] = []
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


def record(line: str) -> None:
    """Adds a line to what `choices` collects."""
    seen = _seen.get()
    if seen is not None and line not in seen:
        seen.append(line)


def decide(*, again: bool = False) -> Mapping[str, str]:
    """Tests the kernels of all imported operations on the default device; call it before training.

    In a job of several processes all of them must call it at the same point: the first one tests,
    and the others use its results. Without this call an operation is tested when it is first
    traced, and a job of several processes uses no kernels.

    Args:
      again: whether to repeat tests that this process or an earlier one has done.

    Returns:
      The reason why kernels are not used, by operation; empty on a CPU.
    """
    return selftest.decide(OPERATIONS.values(), again=again)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An implementation other than the reference.

    Attributes:
      forward: `forward(*operands, **settings)`; the parts of an epilogue are passed as `out_scale`,
        `out_bias`, `out_relu` and `residual`, those that the call has.
      backward: `backward(*operands, dout, **settings)`, a tuple of the operands' gradients; None
        uses those of the reference.
      unsupported: returns why these operands (arrays or their shapes) and settings are not
        supported, in one clause, or None; without this function all are supported.
      layout: layout of the images that it takes and returns.
    """

    forward: Callable[..., jax.Array]
    backward: Callable[..., tuple[Any, ...]] | None = None
    unsupported: Callable[..., str | None] | None = None
    layout: Layout = "NHWC"


class Case(NamedTuple):
    """Arguments for `selftest`: random bfloat16 operands of these shapes, and settings.

    Attributes:
      shapes: of the operands; None for one that is None.
      settings: of the call.
      runs: how many such calls `jax.vmap` makes one of, on a GPU; 0 for a call alone.
    """

    shapes: tuple[tuple[int, ...] | None, ...]
    settings: Mapping[str, Any] = {}
    runs: int = 0


class Epilogue(NamedTuple):
    """Optional steps after an operation: scale, bias, (ReLU,) and addition, in this order.

    An operation may allow `out_relu="last"`: a ReLU after the addition instead.
    """

    out_scale: jax.Array | None = None
    out_bias: jax.Array | None = None
    residual: jax.Array | None = None


Relu = bool | Literal["last"]


def relu_of(name: str, out_relu: Any, residual: jax.Array | None) -> Relu:
    """Returns what `out_relu` of a call says, as one of the values that kernels know.

    Raises:
      ValueError: if it says nothing that there is.
    """
    if isinstance(out_relu, str) and out_relu == "last":
        return True if residual is None else "last"
    if isinstance(out_relu, bool | np.bool_ | int) and out_relu in (0, 1):
        return bool(out_relu)
    raise ValueError(f"{name} needs False, True or 'last' as out_relu, got {out_relu!r}")


def finish(y: jax.Array, epilogue: Epilogue, relu: Relu) -> jax.Array:
    """Applies the epilogue to `y`, `[..., K]`, in plain XLA; scale and bias in float32 or wider."""
    scale, bias, residual = epilogue
    if scale is not None or bias is not None:
        y = affine(y, scale, bias, "NHWC")
    y = jax.nn.relu(y) if relu is True else y
    y = y if residual is None else y + residual
    return jax.nn.relu(y) if relu == "last" else y


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """An operation on images; its arguments must have been checked.

    It is called with operands and keyword settings (hashable values) and returns one array. All
    operations accept `implementation`, `out_relu` and the arguments of an `Epilogue`.

    Attributes:
      name: name for errors and messages.
      reference: `reference(*operands, **settings)` in plain XLA, differentiable.
      kernels: kernels by implementation; those named "cpu", "tpu" and "gpu" are selected on that
        platform if a call names no implementation.
      images: which operands are images, `[N, H, W, C]`; if any is, so are the first and the result.
      prepare: `prepare(*operands, **settings)` converts the settings of a call to those that the
        reference and the kernels take; by default they are the same.
      relu_last: whether it knows `out_relu="last"`.
      cases: what `selftest` runs.
    """

    name: str
    reference: Callable[..., jax.Array]
    kernels: Mapping[str, Kernel]
    images: tuple[bool, ...]
    prepare: Callable[..., dict[str, Any]] | None = None
    relu_last: bool = False
    cases: Sequence[Case] = ()

    def __post_init__(self) -> None:
        OPERATIONS[self.name] = self

    def __call__(
        self,
        *operands: Any,
        implementation: str | None = None,
        out_scale: jax.Array | None = None,
        out_bias: jax.Array | None = None,
        out_relu: Relu = False,
        residual: jax.Array | None = None,
        **settings: Any,
    ) -> jax.Array:
        if implementation not in (None, "xla", *self.kernels):
            raise ValueError(
                f"unknown implementation {implementation!r} of {self.name}; "
                f"known: {', '.join(('xla', *self.kernels))}"
            )
        if implementation is None and implementations.is_only_xla():
            implementation = "xla"
        relu = relu_of(self.name, out_relu, residual)
        if relu == "last" and not self.relu_last:
            raise ValueError(f"{self.name} has no ReLU after the addition, got out_relu 'last'")
        call = _Call(
            self,
            tuple(settings.items()),
            relu,
            implementation,
            implementations.platform(),
            implementations.division(operands[0]) if self.images[0] else None,
        )
        return _run(call, operands, Epilogue(out_scale, out_bias, residual))


class _Call(NamedTuple):
    """The static part of a call, kept so that its gradient uses the same implementation."""

    operation: Operation
    settings: tuple[tuple[str, Any], ...]
    out_relu: Relu
    implementation: str | None
    platform: str
    division: Division | None

    def prepared(self, operands: Sequence[Any]) -> dict[str, Any]:
        """Returns the settings of the reference and the kernels."""
        settings = dict(self.settings)
        prepare = self.operation.prepare
        return settings if prepare is None else prepare(*operands, **settings)

    def reference(self, *operands: Any) -> jax.Array:
        return self.operation.reference(*operands, **self.prepared(operands))

    def forward(self, *arrays: Any) -> jax.Array:
        """Applies the operation and the epilogue, by the implementation for these shapes."""
        count = len(self.operation.images)
        settings = self.prepared(arrays[:count])

        def plain(*arrays: Any) -> jax.Array:
            return finish(self.reference(*arrays[:count]), Epilogue(*arrays[count:]), self.out_relu)

        def by(kernel: Kernel, *arrays: Any) -> jax.Array:
            after: dict[str, Any] = Epilogue(*arrays[count:])._asdict()
            after = {name: array for name, array in after.items() if array is not None}
            after |= {"out_relu": self.out_relu} if self.out_relu else {}
            images = _changed(_into, kernel, arrays[:count], self.operation.images)
            if "residual" in after:
                after["residual"] = _into(after["residual"], kernel.layout)
            return to_nhwc(kernel.forward(*images, **settings, **after), kernel.layout)

        name, reason = self._choice(arrays[:count], settings)
        record(f"{self.operation.name}: {name}" + (f", since {reason}" if reason else ""))
        if name == "xla":
            return plain(*arrays)
        return self._either(
            name, functools.partial(by, self.operation.kernels[name]), plain, arrays
        )

    def backward(self, *arrays: Any) -> tuple[Any, ...]:
        """Returns the operands' gradients; `arrays` are the operands and the result's gradient."""
        images = self.operation.images
        settings = self.prepared(arrays[:-1])

        def plain(*arrays: Any) -> tuple[Any, ...]:
            return jax.vjp(self.reference, *arrays[:-1])[1](arrays[-1])

        name, _ = self._choice(arrays[:-1], settings)
        if name == "xla":
            return plain(*arrays)
        kernel = self.operation.kernels[name]
        backward = kernel.backward
        if backward is None:
            reason: str | None = "its kernel has none"
        else:
            reason = self._unsupported(kernel, arrays[:-1], settings, backward=True)
        if backward is None or reason:
            record(f"{self.operation.name}'s gradient: xla, since {reason}")
            return plain(*arrays)

        def by(*arrays: Any) -> tuple[Any, ...]:
            changed = _changed(_into, kernel, arrays, (*images, images[0]))
            return _changed(to_nhwc, kernel, backward(*changed, **settings), images)

        return self._either(name, by, plain, arrays)

    def _choice(self, operands: Sequence[Any], settings: dict[str, Any]) -> tuple[str, str | None]:
        """Returns the implementation and, if it is plain XLA, the reason.

        Raises:
          ValueError: if the implementation that the call names does not support the operands.
        """
        operation, name = self.operation, self.implementation
        if name == "xla":
            return name, "it is asked for"
        if name is not None:
            if reason := self._unfit(name, operands, settings):
                raise ValueError(f"{operation.name} has no {name!r} for this: {reason}")
            return name, None
        name = self.platform
        if name not in operation.kernels:
            return "xla", f"it has no {name} kernel"
        reason = self._unfit(name, operands, settings)
        if reason is None and name == jax.default_backend() != "cpu":
            reason = selftest.failure(operation)
        return ("xla", reason) if reason else (name, None)

    def _unfit(self, name: str, operands: Sequence[Any], settings: dict[str, Any]) -> str | None:
        kernel = self.operation.kernels[name]
        if kernel.unsupported is None:
            return None
        sizes = [size for array in jax.tree.leaves(operands) for size in array.shape]
        if not all(isinstance(size, int) for size in sizes):
            return "a size is left open"
        wide = name != "cpu" and jax.config.read("jax_enable_x64")
        reason = self._unsupported(kernel, operands, settings, backward=False)
        return reason or ("JAX is in its 64-bit mode" if wide else None)

    def _unsupported(
        self, kernel: Kernel, operands: Sequence[Any], settings: dict[str, Any], *, backward: bool
    ) -> str | None:
        if kernel.unsupported is None:
            return None
        shapes = jax.eval_shape(
            lambda *operands: _changed(from_nhwc, kernel, operands, self.operation.images),
            *operands,
        )
        return kernel.unsupported(*shapes, backward=backward, **settings)

    def _either(
        self,
        name: str,
        kernel: Callable[..., Any],
        plain: Callable[..., Any],
        arrays: Sequence[Any],
    ) -> Any:
        """Runs the kernel, on its platform only where the program may be lowered for another."""
        kernel = differentiable(kernel, plain)
        if self.implementation is not None:
            return kernel(*arrays)
        return jax.lax.platform_dependent(*arrays, **{_LOWERED[name]: kernel}, default=plain)

    def divided(
        self, call: Callable[..., Any], arrays: Sequence[Any], images: Sequence[bool], results: Any
    ) -> Any:
        """Calls a function on each device's images.

        The compiler partitions everything else over the devices, but it cannot look into a kernel
        and would gather the whole batch on each device.

        Args:
          call: function of `arrays`.
          arrays: arrays, or trees of them.
          images: which of them have a batch axis.
          results: which of the results have one; the others are summed over the devices.
        """
        if self.division is None:
            return call(*arrays)
        mesh, axes, free = self.division
        specs = {True: PartitionSpec(axes or None), False: PartitionSpec()}

        def on_one(*arrays: Any) -> Any:
            found = call(*arrays)
            if not isinstance(results, tuple):
                return found
            return tuple(
                result if is_image or not axes else jax.lax.psum(result, axes)
                for result, is_image in zip(found, results, strict=True)
            )

        return jax.shard_map(
            on_one,
            mesh=mesh,
            in_specs=tuple(specs[image] for image in images),
            out_specs=jax.tree.map(specs.get, results),
            axis_names=free,
            check_vma=False,
        )(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(call: _Call, operands: tuple[Any, ...], epilogue: Epilogue) -> jax.Array:
    images = call.operation.images
    return call.divided(
        call.forward, (*operands, *epilogue), (*images, False, False, images[0]), images[0]
    )


def _forward(call, operands, epilogue):
    y = _run(call._replace(out_relu=False), operands, Epilogue())
    after = functools.partial(finish, relu=call.out_relu)
    out, unfinish = jax.vjp(after, y, epilogue)
    return out, (unfinish, operands)


def _backward(call, residuals, dout):
    unfinish, operands = residuals
    dy, depilogue = unfinish(dout)
    images = call.operation.images
    gradients = call.divided(call.backward, (*operands, dy), (*images, images[0]), images)
    return tuple(gradients), depilogue


_run.defvjp(_forward, _backward)


def _into(image: jax.Array, layout: Layout) -> jax.Array:
    """Transposes an image to a kernel's layout, which becomes its layout in memory, without a copy.

    Without the barrier XLA computes the producers of the image twice, in the kernel's order of axes
    and in NHWC: a training step of ShiftResNet20 moves 17.0 MB per image instead of 14.8.
    """
    return image if layout == "NHWC" else from_nhwc(jax.lax.optimization_barrier(image), layout)


def _changed(
    change: Callable[[jax.Array, Layout], jax.Array],
    kernel: Kernel,
    arrays: Sequence[Any],
    images: Sequence[bool],
) -> tuple[Any, ...]:
    """Returns the arrays, with the images among them converted to or from the kernel's layout."""
    pairs = zip(arrays, images, strict=True)
    return tuple(change(array, kernel.layout) if image else array for array, image in pairs)


def differentiable(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `kernel` with the derivatives of `plain`.

    The gradient of an operation is defined above; these derivatives serve second derivatives, which
    differentiate the kernels that the first ones run.
    """
    call = jax.custom_jvp(kernel)

    @call.defjvp
    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        return call(*primals), jax.jvp(plain, primals, tangents)[1]

    return call
