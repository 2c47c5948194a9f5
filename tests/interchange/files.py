"""Small foreign files, assembled opcode by opcode, honest and hostile ones.

No `pickle` and no PyTorch here: what a test wants in a file is written down in bytes.
"""

import dataclasses
import io
import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

PROTO = b"\x80\x02"
STOP = b"."
MAGIC = PROTO + b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" + STOP
VERSION = PROTO + b"M\xe9\x03" + STOP

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclasses.dataclass(frozen=True)
class Name:
    """A global."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """REDUCE of a global."""

    function: Any
    arguments: tuple


@dataclasses.dataclass(frozen=True)
class New:
    """NEWOBJ of a class, and BUILD where there is a state."""

    kind: Any
    state: Any = None
    arguments: tuple = ()


@dataclasses.dataclass(frozen=True)
class Build:
    """BUILD of any object."""

    target: Any
    state: Any


@dataclasses.dataclass(frozen=True)
class Persistent:
    """A persistent id."""

    identity: Any


@dataclasses.dataclass(frozen=True)
class Raw:
    """Opcodes as they are."""

    code: bytes


def code(value: Any, python2: bool = False) -> bytes:
    """The opcodes that push a value."""

    def push(part: Any) -> bytes:
        return code(part, python2)

    match value:
        case Raw():
            return value.code
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            if 0 <= value < 256:
                return b"K" + bytes([value])
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str() if python2 and len(value) < 256:
            return b"U" + bytes([len(value)]) + value.encode("latin-1")
        case str():
            text = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(text)) + text
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(push, value)) + b"t"
        case list():
            return b"](" + b"".join(map(push, value)) + b"e"
        case dict():
            pairs = b"".join(push(key) + push(value[key]) for key in value)
            return b"}(" + pairs + b"u"
        case Name():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            return push(value.function) + push(value.arguments) + b"R"
        case New():
            made = push(value.kind) + push(value.arguments) + b"\x81"
            return made if value.state is None else made + push(value.state) + b"b"
        case Build():
            return push(value.target) + push(value.state) + b"b"
        case Persistent():
            return push(value.identity) + b"Q"
    raise TypeError(value)


def pickled(value: Any, python2: bool = False) -> bytes:
    return PROTO + code(value, python2) + STOP


ORDERED = Name("collections", "OrderedDict")


def ordered(items: Mapping[str, Any]) -> Call:
    return Call(ORDERED, ([list(pair) for pair in items.items()],))


def storage_id(
    key: str, kind: str, count: int, view: Any = (), package: str = "torch"
) -> Persistent:
    """A storage's persistent id; `view` is what follows the count, if anything."""
    return Persistent(("storage", Name(package, kind), key, "cuda:0", count, *view))


def tensor(
    array: np.ndarray,
    key: str,
    *,
    offset: int = 0,
    count: int | None = None,
    shape: tuple | None = None,
    strides: tuple | None = None,
    view: Any = (),
    package: str = "torch",
    old: bool = False,
) -> Call:
    """A tensor that takes an array's place; every number can be replaced by a wrong one."""
    shape = array.shape if shape is None else shape
    if strides is None:
        strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    count = array.size if count is None else count
    storage = storage_id(key, STORAGES[array.dtype.name], count, view, package)
    if old:
        return Call(Name("torch._utils", "_rebuild_tensor"), (storage, offset, shape, strides))
    rest = (False, Call(ORDERED, ()))
    return Call(
        Name("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, strides, *rest)
    )


def parameter(value: Call) -> Call:
    return Call(Name("torch._utils", "_rebuild_parameter"), (value, True, Call(ORDERED, ())))


def old_parameter(value: Call) -> Build:
    """As PyTorch 0.2 and 0.3 wrote it."""
    return Build(Call(Name("torch.nn.parameter", "Parameter"), (value,)), (True, False, None))


def module(
    kind: Any,
    parameters: Mapping[str, Any] | None = None,
    buffers: Mapping[str, Any] | None = None,
    modules: Mapping[str, Any] | None = None,
    **attributes: Any,
) -> New:
    groups = {"_parameters": parameters, "_buffers": buffers, "_modules": modules}
    groups = {name: ordered(group or {}) for name, group in groups.items()}
    return New(kind, {**groups, "training": True, **attributes})


def zipped(members: Iterable[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


def zip_file(
    top: Any, storages: Mapping[str, Any] = {}, *, compression: int = zipfile.ZIP_STORED
) -> bytes:
    """A PyTorch file of 1.6 and later; storages by key."""
    data = top if isinstance(top, bytes) else pickled(top)
    members = [("archive/data.pkl", data), ("archive/byteorder", b"little")]
    for key, values in storages.items():
        members.append((f"archive/data/{key}", bytes(values)))
    return zipped([*members, ("archive/version", b"3\n")], compression)


def legacy_file(
    top: Any,
    storages: Mapping[str, np.ndarray] = {},
    *,
    python2: bool = False,
    magic: bytes = MAGIC,
    version: bytes = VERSION,
    info: bytes | None = None,
    keys: Any = None,
) -> bytes:
    """A PyTorch file of before 1.6; storages by key."""
    sizes = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    data = top if isinstance(top, bytes) else pickled(top, python2)
    file = magic + version + (info or pickled(sizes, python2)) + data
    file += pickled(list(storages) if keys is None else keys, python2)
    for values in storages.values():
        file += struct.pack("<q", values.size) + values.tobytes()
    return file


def safetensors(
    arrays: Mapping[str, np.ndarray], header: dict | bytes | None = None, **extra: Any
) -> bytes:
    names = {"float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8", "bool": "BOOL"}
    entries: dict[str, Any] = dict(extra)
    body = b""
    for name, array in arrays.items():
        span = [len(body), len(body) + array.nbytes]
        entries[name] = {
            "dtype": names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": span,
        }
        body += array.tobytes()
    text = header if isinstance(header, bytes) else json.dumps(header or entries).encode()
    return struct.pack("<Q", len(text)) + text + body


def npz(arrays: Mapping[str, np.ndarray], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


# What exported arrays say of their network.
DESCRIPTION = json.dumps(
    {
        "config": json.dumps({"model": {"arch": "resnet8", "weights": "sign"}}),
        "class_names": ["cat", "dog"],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
)


def commented(archive: bytes, comment: str) -> bytes:
    """A zip archive without a comment, with one."""
    return archive[:-2] + struct.pack("<H", len(comment)) + comment.encode()


def network(python2: bool = False, old: bool = False) -> tuple[dict, dict[str, np.ndarray]]:
    """A checkpoint with a small module, and its storages, which are its arrays in order."""
    draw = np.random.default_rng(0)
    storages = {
        "1": draw.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "2": draw.standard_normal(4).astype(np.float32),
        "3": draw.random(4).astype(np.float32),
        "4": np.array(17, np.int64),
        "5": draw.standard_normal((2, 4)).astype(np.float32),
    }
    wrap = old_parameter if old else parameter

    def class_name(package: str, name: str) -> Any:
        kind = Name(package, name)
        if python2:
            return Persistent(("module", kind, f"{name}.py", f"class {name}: pass\n"))
        return kind

    def take(key: str) -> Call:
        return tensor(storages[key], key, old=old, view=(None,) if python2 else ())

    conv = module(
        class_name("torch.nn.modules.conv", "Conv2d"),
        {"weight": wrap(take("1")), "bias": None},
        stride=(1, 1),
        in_channels=3,
    )
    norm = module(
        class_name("torch.nn.modules.batchnorm", "BatchNorm2d"),
        {"weight": wrap(take("2"))},
        {"running_var": take("3"), "num_batches_tracked": take("4")},
        momentum=0.1,
    )
    linear = module(class_name("torch.nn.modules.linear", "Linear"), {"weight": wrap(take("5"))})
    top = module(
        class_name("models.resnet", "ResNet"),
        modules={"conv1": conv, "bn1": norm, "linear": linear},
        out_hw=Call(Name("torch", "Size"), ((4, 64),)),
    )
    return {"acc": 55.05, "net": top, "epoch": 3}, storages


def scalar(kind: str, data: bytes, order: str = "<") -> Call:
    """A NumPy number as protocol 2 writes it."""
    state = (3, order, None, None, None, -1, -1, 0)
    dtype = Build(Call(Name("numpy", "dtype"), (kind, False, True)), state)
    return Call(Name("numpy._core.multiarray", "scalar"), (dtype, encoded(data)))


def encoded(data: bytes) -> Call:
    return Call(Name("_codecs", "encode"), (data.decode("latin-1"), "latin1"))


def ndarray(array: np.ndarray) -> Build:
    start = (Name("numpy", "ndarray"), (0,), encoded(b"b"))
    dtype = Build(Call(Name("numpy", "dtype"), (array.dtype.str[1:], False, True)), (3, "<"))
    state = (1, array.shape, dtype, False, encoded(array.tobytes()))
    return Build(Call(Name("numpy.core.multiarray", "_reconstruct"), start), state)


# What stands beside networks in checkpoints and is of no use here.
BESIDE = {
    "path": Call(Name("pathlib", "PosixPath"), ("/", "runs")),
    "path_of_3.13": Call(Name("pathlib._local", "PosixPath"), ("runs",)),
    "date": Call(Name("datetime", "datetime"), (encoded(b"\x07\xe8\x01\x01" + bytes(6)),)),
    "args": New(Name("argparse", "Namespace"), {"out": Call(Name("pathlib", "Path"), ("a",))}),
    "history": Raw(code(Call(Name("collections", "deque"), ((), 20))) + code(1.0) + b"a"),
    "losses": ndarray(np.arange(5.0)),
    "rng": ("MT19937", ndarray(np.arange(6, dtype=np.uint32)), 3, 0, 0.0),
    "generator": Build(
        Call(Name("numpy.random._pickle", "__randomstate_ctor"), ("MT19937",)), {"state": {}}
    ),
    "raw": Call(Name("__builtin__", "bytearray"), ("abc", "latin-1")),
    "buffer": Raw(b"\x96\x03\x00\x00\x00\x00\x00\x00\x00abc"),
    "none": Call(Name("__builtin__", "bytes"), ()),
    "options": ordered({"lr": 0.1, "size": Call(Name("decimal", "Decimal"), ("0.1",))}),
}


NAMES = ("conv1.weight", "bn1.weight", "bn1.running_var", "bn1.num_batches_tracked")
NAMES += ("linear.weight",)


def honest() -> dict[str, bytes]:
    """One small file of each kind."""
    top, storages = network()
    state = {
        f"module.{name}": tensor(a, k) for name, (k, a) in zip(NAMES, storages.items(), strict=True)
    }
    beside = {
        "model_state_dict": {
            f"module._orig_mod.{name}": tensor(a, k)
            for name, (k, a) in zip(NAMES, storages.items(), strict=True)
        },
        "acc": scalar("f8", struct.pack("<d", 91.25)),
        "best": scalar("f4", struct.pack("<f", 91.25)),
        "count": scalar("i8", struct.pack("<q", 3)),
        "good": scalar("b1", b"\x07", "|"),
        "big_endian": scalar("i8", struct.pack(">q", 3), ">"),
        **BESIDE,
    }
    averages = {"a": np.zeros(2, np.float32)}
    take = {name: tensor(a, k) for name, (k, a) in zip(NAMES, storages.items(), strict=True)}
    lightning = {
        "state_dict": {
            **{f"model.{name}": value for name, value in take.items()},
            "criterion.weight": tensor(storages["2"], "2"),
            **{f"ema_model.{name}": value for name, value in list(take.items())[:4]},
        },
        "state_dict_ema": {"conv1.weight": tensor(averages["a"], "a")},
    }
    lightning["state_dict"]["ema_model.n"] = tensor(storages["4"], "4")
    checkpoint = {"epoch": 2, "state_dict": ordered(state), "optimizer": {"state": {}}}
    arrays = dict(zip(NAMES, storages.values(), strict=True))
    return {
        "zip.pth": zip_file(top, {key: a.tobytes() for key, a in storages.items()}),
        "deflated.pth": zip_file(
            checkpoint,
            {key: a.tobytes() for key, a in storages.items()},
            compression=zipfile.ZIP_DEFLATED,
        ),
        "legacy.t7": legacy_file(top, storages),
        "python2.t7": legacy_file(*network(python2=True), python2=True),
        "torch03.t7": legacy_file(*network(python2=True, old=True), python2=True),
        "beside.pth": zip_file(beside, {key: a.tobytes() for key, a in storages.items()}),
        "lightning.ckpt": legacy_file(lightning, storages | averages),
        "arrays.npz": npz(arrays),
        "compressed.npz": npz(arrays, compressed=True),
        "arrays.safetensors": safetensors(arrays, __metadata__={"format": "pt"}),
        "described.npz": commented(npz(arrays), json.dumps({"shiftnet.model": DESCRIPTION})),
        "described.safetensors": safetensors(
            arrays, __metadata__={"format": "pt", "shiftnet.model": DESCRIPTION}
        ),
        "described.pth": zip_file(
            {"state_dict": take, "shiftnet.model": DESCRIPTION},
            {key: a.tobytes() for key, a in storages.items()},
        ),
    }
