"""Reader of init-state files that executes nothing in them.

Accepted are ``.npz`` and ``.npy`` files, files that ``torch.save`` makes of an array or a tensor
(zip archives and the older format), and plain pickles of arrays, by numpy 1 and numpy 2. In a
pickle, every name is replaced by a class or function of this module, so that the pickle can only
describe an array; the array is made afterwards, from checked parts. Reading needs no torch.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from verl_vla.core.errors import ConfigError
from verl_vla.core.json_files import require_regular

MAX_BYTES = 1 << 28
"""Largest file size, packed and unpacked. 1,000 init states of LIBERO's largest task need 1 MB."""
REMEDY = (
    "reinstall the package that it belongs to, or write [states, values] with "
    "numpy.savez(FILE, states=...)"
)
MAX_MEMO = 1 << 16
"""Largest index in a pickle's memo. An array needs a dozen; a large index allocates memory for all
indices below it."""
ZIP_MAGIC = b"PK\x03\x04"
NPY_MAGIC = b"\x93NUMPY"
TORCH_MAGIC = 0x1950A86A20F9469CFC6C
"""First pickle of a file of ``torch.save`` before 1.6 (torch ``serialization.py``)."""
TORCH_PROTOCOL = 1001
"""Second pickle of such a file."""
STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "LongStorage": "i8",
    "IntStorage": "i4",
}
"""numpy's dtypes by torch's storage types."""
DTYPES = frozenset(STORAGES.values())
# fmt: off
OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID",
    "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE",
    "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "BINFLOAT", "UNICODE",
    "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND",
    "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS",
))
# fmt: on
"""Opcodes that pickles of arrays consist of; a pickle with any other is refused."""
MEMO_OPCODES = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))


def read_states(file: Path) -> npt.NDArray[np.float64]:
    """Read init states, [states, values]; a file of one dimension holds one state.

    Raises:
        ConfigError: the file cannot be read, is damaged, holds anything but an array, or asks for
            code to be run.
    """
    require_regular(file, REMEDY)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise _RefusedError(f"it is larger than {MAX_BYTES >> 20} MiB")
        states = _read(file.read_bytes())
        if not states.size:
            raise _RefusedError(f"it is empty, {list(states.shape)}")
        if states.ndim == 1:
            states = states[None]
        if states.ndim != 2:
            raise _RefusedError(f"it holds {list(states.shape)}, not [states, values]")
        if not np.isfinite(states).all():
            raise _RefusedError("a value in it is not finite")
    except Exception as error:  # a damaged file fails in too many ways to name
        reason = str(error) if isinstance(error, _RefusedError) else f"damaged ({error!r})"
        raise ConfigError(f"{file} cannot be read as init states: {reason}; {REMEDY}") from error
    return states


class _RefusedError(ValueError):
    """A file that is refused for a known reason."""


def _read(content: bytes) -> npt.NDArray[np.float64]:
    stream = io.BytesIO(content)
    if content.startswith(NPY_MAGIC):
        return _as_states(np.load(stream, allow_pickle=False))
    if content.startswith(ZIP_MAGIC):
        return _read_archive(stream)
    first = _unpickle(stream)
    return _read_old_torch(stream) if first == TORCH_MAGIC else _make(first, {})


def _read_archive(stream: io.BytesIO) -> npt.NDArray[np.float64]:
    with zipfile.ZipFile(stream) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > MAX_BYTES:
            raise _RefusedError(f"it unpacks to {unpacked >> 20} MiB, over {MAX_BYTES >> 20}")
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if not pickles:
            # an .npz file is a zip archive as well, of .npy files
            stream.seek(0)
            return _read_npz(stream)
        if len(pickles) > 1:
            raise _RefusedError(f"it holds {len(pickles)} pickles, not one")
        folder = pickles[0].removesuffix("data.pkl")
        recorded = _unpickle(io.BytesIO(archive.read(pickles[0])))
        order_file = f"{folder}byteorder"
        order = "little" if order_file not in names else archive.read(order_file).decode()
        if order not in ("little", "big"):
            raise _RefusedError(f"its byte order is {order!r}")
        prefix = f"{folder}data/"
        storages = {
            name.removeprefix(prefix): archive.read(name)
            for name in names
            if name.startswith(prefix)
        }
    return _make(recorded, storages, "<" if order == "little" else ">")


def _read_npz(stream: io.BytesIO) -> npt.NDArray[np.float64]:
    with np.load(stream, allow_pickle=False) as stored:
        name = "states" if "states" in stored.files or len(stored.files) != 1 else stored.files[0]
        if name not in stored.files:
            raise _RefusedError(f"it has no array 'states', only {stored.files}")
        return _as_states(stored[name])


def _read_old_torch(stream: io.BytesIO) -> npt.NDArray[np.float64]:
    """Read what follows the magic number: protocol, byte order, object, and tensors' content."""
    protocol, system, recorded = (_unpickle(stream) for _ in range(3))
    if protocol != TORCH_PROTOCOL:
        raise _RefusedError(f"its torch protocol is {protocol}, not {TORCH_PROTOCOL}")
    order = "<" if system["little_endian"] else ">"
    storages: dict[str, bytes] = {}
    for key in _unpickle(stream):
        # each storage is its number of values, then the values
        numel = int(np.frombuffer(stream.read(8), f"{order}i8")[0])
        size = np.dtype(recorded.storage.dtype).itemsize
        storages[key] = stream.read(numel * size)
    return _make(recorded, storages, order)


def _make(
    recorded: Any, storages: Mapping[str, bytes], order: str = "<"
) -> npt.NDArray[np.float64]:
    if isinstance(recorded, (_Array, _Tensor)):
        return _as_states(recorded.make(storages, order))
    raise _RefusedError(f"it holds a {type(recorded).__name__}, not an array")


def _as_states(array: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    # of any byte order: the copy below has the machine's
    if array.dtype.newbyteorder("=").str[1:] not in DTYPES:
        raise _RefusedError(f"its values are {array.dtype}, no numbers of {sorted(DTYPES)}")
    return np.array(array, dtype=np.float64)


class _Array:
    """A numpy array, as a pickle describes it."""

    def __init__(self, dtype: Any = None, shape: Any = (), content: Any = b"", *, is_f: Any = 0):
        self.dtype, self.shape, self.content, self.is_f = dtype, shape, content, is_f

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.is_f, self.content = state

    def make(self, storages: Mapping[str, bytes], order: str) -> npt.NDArray[Any]:
        if not isinstance(self.dtype, _Dtype) or self.dtype.name not in DTYPES:
            raise _RefusedError(f"its array is of {self.dtype}, no numbers of {sorted(DTYPES)}")
        flat = np.frombuffer(self.content, self.dtype.order + self.dtype.name)
        return flat.reshape(self.shape, order="F" if self.is_f else "C")


class _Dtype:
    """A numpy dtype, as a pickle describes it."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name, self.order = name, "="

    def __repr__(self) -> str:
        return f"dtype {self.name!r}"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise _RefusedError(f"its byte order is {order!r}")
        self.order = order


@dataclass(frozen=True, kw_only=True)
class _Storage:
    """A reference to the content of a tensor."""

    key: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """A torch tensor, as a pickle describes it."""

    storage: Any
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def make(self, storages: Mapping[str, bytes], order: str) -> npt.NDArray[Any]:
        if not isinstance(self.storage, _Storage) or self.storage.key not in storages:
            raise _RefusedError("the content of its tensor is missing")
        content = np.frombuffer(storages[self.storage.key], order + self.storage.dtype)
        # a tensor can be a view with gaps; only one that fills its part row by row is read
        rows = math.prod(self.size[1:])
        row_major = [math.prod(self.size[i + 1 :]) for i in range(len(self.size))]
        if list(self.stride) != row_major or self.offset < 0 or min(self.size, default=0) < 0:
            raise _RefusedError("its tensor is not stored row by row; call .contiguous() first")
        end = self.offset + rows * (self.size[0] if self.size else 1)
        if end > len(content):
            raise _RefusedError("its tensor is larger than its content")
        return content[self.offset : end].reshape(self.size)


class _Global:
    """A callable that replaces one named by a pickle.

    Each occurrence gets a new object without attributes of a function or class: a pickle can set
    attributes of the objects that it has named.
    """

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)


def _latin(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _RefusedError(f"it encodes bytes as {encoding!r}")
    return text.encode("latin1")


def _frombuffer(content: Any, dtype: Any, shape: Any, order: str) -> _Array:
    return _Array(dtype, shape, content, is_f=order == "F")


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> _Tensor:
    return _Tensor(storage=storage, offset=offset, size=tuple(size), stride=tuple(stride))


_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin,
    ("__builtin__", "bytes"): lambda: b"",  # protocol 2 writes no content as a call of it
    ("collections", "OrderedDict"): dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    **{
        (f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array()
        for core in ("core", "_core")
    },
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}
"""Names that a pickle may use, with their replacements; any other name is refused."""


def _unpickle(stream: io.BytesIO) -> Any:
    """Read the next pickle of a stream, after checking its opcodes."""
    start = stream.tell()
    # the whole pickle is checked before any of it is built
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name not in OPCODES:
            raise _RefusedError(f"it holds a pickle with {opcode.name}, which no array needs")
        if argument is not None and opcode.name in MEMO_OPCODES and argument > MAX_MEMO:
            raise _RefusedError(f"it holds a pickle with a memo of {argument} places")
    end = stream.tell()
    # those bytes and no others: the stream may hold more
    return _Unpickler(io.BytesIO(stream.getbuffer()[start:end])).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == "torch" and global_name in STORAGES:
            # a pickle names the type in the id of a storage, and never calls it
            return STORAGES[global_name]
        if (module_name, global_name) not in _GLOBALS:
            raise _RefusedError(f"it asks for {module_name}.{global_name}, which no array needs")
        return _Global(_GLOBALS[module_name, global_name])

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or dtype not in DTYPES:
            raise _RefusedError(f"it holds a {kind} of {dtype}, no numbers of {sorted(DTYPES)}")
        return _Storage(key=str(key), dtype=str(dtype))
