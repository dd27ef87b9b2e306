"""The tensor of the pretended device, and what runs its operators."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretend.rules import check

aten = torch.ops.aten


def _leaves(value: Any) -> Iterator[Any]:
    """What is in an operator's arguments; PyTorch's own trees know more, and take three times as long."""
    if type(value) in (tuple, list):
        for item in value:
            yield from _leaves(item)
    elif type(value) is dict:
        yield from _leaves([*value.values()])
    else:
        yield value


def _mapped(kind: type, function: Callable[[Any], Any], value: Any) -> Any:
    """Arguments or results with the function of what is of a kind in its place."""
    if isinstance(value, kind):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(kind, function, item) for item in value)
    if type(value) is dict:
        return {name: _mapped(kind, function, item) for name, item in value.items()}
    return value


class Lease:
    """Lies with a tensor while it lives: tensors with weak references cannot be swapped by `module.to`."""

    def __init__(self, memory: Memory, key: int) -> None:
        self._memory = memory
        self._key = key

    def __del__(self) -> None:
        self._memory.drop(self._key)


class Memory:
    """What tensors of the device take; storages are counted once, however many tensors view them."""

    def __init__(self) -> None:
        self.capacity: int | None = None  # None: endless
        self.now = self.peak = 0
        self._storages: dict[int, list[int]] = {}  # storage -> tensors that view it, bytes

    def hold(self, tensor: Pretend) -> None:
        """Count a tensor until it is gone."""
        storage = tensor.inner.untyped_storage()
        entry = self._storages.setdefault(storage._cdata, [0, storage.nbytes()])
        if not entry[0]:
            self.now += entry[1]
            self.peak = max(self.peak, self.now)
        entry[0] += 1
        tensor.lease = Lease(self, storage._cdata)

    def drop(self, key: int) -> None:
        entry = self._storages[key]
        entry[0] -= 1
        if not entry[0]:
            self.now -= entry[1]
            del self._storages[key]

    def check(self) -> None:
        """Raise PyTorch's error if there is more than there is room for."""
        if self.capacity is not None and self.now > self.capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {self.now:,} of {self.capacity:,} bytes")


class Machine:
    """Runs operators: on the CPU, after the checks of a GPU.

    Attributes:
        device: The device.
        memory: Its allocator.
        launches: Kernels by operator.
        crossings: Copies between host and device.
        sent: Bytes that were copied to the device, by dtype.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.memory = Memory()
        self.launches: collections.Counter[str] = collections.Counter()
        self.crossings: collections.Counter[str] = collections.Counter()
        self.sent: collections.Counter[str] = collections.Counter()

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One operator."""
        tensors = [a for a in _leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        ours = [a for a in tensors if isinstance(a, Pretend)]
        plain = [a for a in tensors if not isinstance(a, Pretend)]
        if any(type(a) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) for a in plain):
            return NotImplemented  # a tensor subclass of torchao: it comes back with what it is made of
        name = func._schema.name.split("::")[1]
        if name == "to":
            return self._to(args[0], kwargs)
        target = kwargs.get("device")
        place = None if target is None else torch.device(target).type
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        if not ours and place != self.device.type:
            return func(*args, **kwargs)
        check(func, name, args, kwargs, plain)
        if name in ("pin_memory", "_pin_memory"):
            raise RuntimeError("only tensors of the CPU can be pinned")
        if name == "record_stream":
            return None
        leaves = place is not None and place != self.device.type and place != "meta"
        if place is not None and place != "meta":
            kwargs = kwargs | {"device": torch.device("cpu")}
        if name == "copy_" and isinstance(args[0], Pretend) != isinstance(args[1], Pretend):
            leaves = isinstance(args[1], Pretend)
            self._cross(args[1], leaves)
        elif name == "_to_copy" and (leaves or plain):
            self._cross(args[0], leaves)
        elif not func.is_view:
            self.launches[name] += 1
        values, named = _mapped(Pretend, lambda tensor: tensor.inner, (args, kwargs))
        out = func(*self._as_on_a_gpu(name, values), **named)
        if leaves:
            return args[0] if name == "copy_" else out
        return self._wrapped(func, args, kwargs, out)

    def _cross(self, tensor: Tensor, leaves: bool) -> None:
        self.crossings["to host" if leaves else "to device"] += 1
        if not leaves:
            self.sent[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes

    def _to(self, tensor: Tensor, kwargs: dict[str, Any]) -> Any:
        """`to` as a whole, which torchao asks for."""
        wanted = {
            k: v for k, v in kwargs.items() if k in ("dtype", "device", "non_blocking") and v is not None
        }
        same = wanted.get("device") in (None, tensor.device) and wanted.get("dtype") in (None, tensor.dtype)
        if same and not kwargs.get("copy"):
            return tensor
        return self.run(aten._to_copy.default, (tensor,), wanted)

    @staticmethod
    def _as_on_a_gpu(name: str, args: Sequence[Any]) -> Sequence[Any]:
        """Arguments where the CPU's operator does not do what the GPU's does."""
        if name == "histc" and not args[0].is_floating_point():  # counts integers on a GPU only
            return (args[0].float(), *args[1:])
        if name.endswith("_like") and args[0].is_meta:
            like = torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype)
            return (like, *args[1:])
        return args

    def _wrapped(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Any:
        """Results as tensors of the device; what was written into is what was given."""
        returns = func._schema.returns
        if len(returns) <= 1:
            return self._result(func, returns[0], args, kwargs, out) if returns else None
        made = [self._result(func, r, args, kwargs, value) for r, value in zip(returns, out, strict=True)]
        return made if isinstance(out, list) else tuple(made)

    def _result(
        self, func: Any, returned: Any, args: Sequence[Any], kwargs: dict[str, Any], value: Any
    ) -> Any:
        alias = returned.alias_info
        if alias is not None and alias.is_write:
            for number, argument in enumerate(func._schema.arguments):
                own = argument.alias_info
                if own is not None and own.before_set & alias.before_set:
                    return kwargs.get(argument.name, args[number] if number < len(args) else None)
        made = _mapped(torch.Tensor, self.tensor, value)
        self.memory.check()
        return made

    def tensor(self, value: Tensor) -> Pretend:
        """A tensor of the device with these values."""
        if isinstance(value, Pretend):
            return value
        made = Pretend(value)
        self.memory.hold(made)
        return made


MACHINE = Machine()


class Pretend(torch.Tensor):
    """Says it is on the device, and keeps its values in an ordinary tensor."""

    inner: Tensor
    lease: Lease

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretend:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=MACHINE.device, requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"Pretend({self.inner!r})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def record_stream(self, stream: Any) -> None:
        pass

    def data_ptr(self) -> int:
        """Of the values: what is made without storage is at address 0, all of it."""
        return self.inner.data_ptr()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a device's tensor to numpy. Use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return MACHINE.run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None


class PretendMode(TorchDispatchMode):
    """Inside, operators that are to make tensors of the device do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return MACHINE.run(func, args, kwargs or {})
