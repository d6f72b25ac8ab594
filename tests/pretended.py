"""A simulated GPU: its tensors report `cuda:0`, compute on the CPU, and raise an error if mixed with CPU tensors.

`python tests/pretended.py COMMAND...` runs `compress COMMAND` with it, so that code which would mix devices on a GPU
fails here, too. Not simulated: kernels, which are reported as missing; gradients, which torch computes below the level
of a subclass; time and memory. It relies on internals of the torch version that `constraints.txt` pins: the registry of
device guards, and wrapper subclasses.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing

THERE = torch.device("cuda", 0)
CUDA, META = 1, 14  # their values in c10::DeviceType
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
aten = torch.ops.aten
CROSSING = (aten.copy_.default, aten._to_copy.default)  # may read from the other device
PLAIN = (aten._local_scalar_dense.default, aten.equal.default)  # return no tensor
INDEXING = ("index", "index_put_", "_index_put_impl_")  # may have indices on the CPU


class Far(torch.Tensor):
    """A tensor on the simulated GPU; `near` is the CPU tensor that holds its values."""

    near: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        made: Far = torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=THERE,
        )
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    # methods that torch implements without dispatching to a subclass

    def tolist(self) -> Any:
        return self.near.tolist()

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def untyped_storage(self) -> Any:
        return self.near.untyped_storage()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    @property
    def data(self) -> Far:
        return Far(self.near)

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        if not isinstance(other, Far):
            raise RuntimeError("a tensor of the CPU put into a parameter on cuda:0")
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.near = other.near

    def __deepcopy__(self, memo: dict[int, Any]) -> Far:
        made = Far(self.near.clone())
        made.__dict__ |= {key: value for key, value in vars(self).items() if key != "near"}
        memo[id(self)] = made
        return made

    def __getitem__(self, key: Any) -> Any:
        return torch.Tensor.__getitem__(self, moved(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        torch.Tensor.__setitem__(self, moved(key), value)


def moved(key: Any) -> Any:
    """An index with lists converted to tensors on the simulated GPU, as torch does on a real one."""
    if isinstance(key, tuple):
        return tuple(map(moved, key))
    if not isinstance(key, list):
        return key
    return Far(torch.as_tensor(key, dtype=torch.bool if key and isinstance(key[0], bool) else torch.long))


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operation; raises RuntimeError for tensors on two devices, as on a real GPU."""
    given = [leaf for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, torch.Tensor)]
    far = any(isinstance(tensor, Far) for tensor in given)
    if far and func not in CROSSING:
        check_company(func, args, given)
    if func is aten.is_pinned.default:
        return False
    asked = kwargs.get("device")
    near_kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    if asked is not None:
        far = torch.device(asked).type == "cuda"
        near_kwargs["device"] = "cpu" if far else asked
    elif func is aten.copy_.default:
        far = isinstance(args[0], Far)
    near_args, near_kwargs = pytree.tree_map(near, (args, near_kwargs))
    out = func(*near_args, **near_kwargs)
    if not far or func in PLAIN:
        return out
    out = pytree.tree_map(lambda x: Far(x) if isinstance(x, torch.Tensor) else x, out)
    aliases = any(value.alias_info is not None for value in func._schema.returns)
    return return_and_correct_aliasing(func, args, kwargs, out) if aliases else out


def near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


def check_company(func: Any, args: Any, given: list[torch.Tensor]) -> None:
    """Raise RuntimeError if a CPU tensor is mixed with GPU tensors; CPU scalars and indices are allowed."""
    indexing = func._schema.name.removeprefix("aten::") in INDEXING
    if indexing and not isinstance(args[0], Far):
        raise RuntimeError(f"{func}: indices on cuda:0 for a tensor of the CPU")
    for tensor in given:
        index = indexing and not tensor.is_floating_point() and tensor is not args[0]
        if tensor.dim() and not index and not isinstance(tensor, Far):
            raise RuntimeError(f"{func}: expected all tensors to be on one device, {tuple(tensor.shape)} is on the CPU")


class Pretending(TorchDispatchMode):
    """Within this mode, new tensors can be created on `cuda:0`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class NoGrad(torch.no_grad):
    """Replaces `torch.inference_mode`, because wrapper subclasses cannot be inference tensors."""

    def __new__(cls, mode: bool = True) -> NoGrad:
        return object.__new__(cls)

    def __init__(self, mode: bool = True) -> None:
        super().__init__()
        self.mode = mode

    def __enter__(self) -> None:
        super().__enter__()
        if not self.mode:
            torch.set_grad_enabled(self.prev)


class Stream:
    """A stream whose work is always finished."""

    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


def made(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wraps `torch.tensor` and `torch.as_tensor`, which move data to a device below the level of a subclass."""

    def make(data: Any, *, dtype: Any = None, device: Any = None, **more: Any) -> torch.Tensor:
        found = data if isinstance(data, torch.Tensor) else real(data, dtype=dtype, **more)
        return found.to(device=device or found.device, dtype=dtype or found.dtype)

    return make


GPU: Mapping[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_lazy_init": lambda: None,
    "_is_in_bad_fork": lambda: False,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "device": lambda *_: nullcontext(),
    "get_device_capability": lambda *_: (9, 0),
    "get_device_name": lambda *_: "none",
    "is_bf16_supported": lambda *_, **__: True,
    "mem_get_info": lambda *_: (80 << 30, 80 << 30),
    "memory_allocated": lambda *_: 0,
    "memory_reserved": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
    "synchronize": lambda *_: None,
    "manual_seed": lambda _: None,
    "manual_seed_all": lambda _: None,
    "Stream": Stream,
    "current_stream": lambda *_: Stream(),
    "stream": lambda _: nullcontext(),
}


def install() -> None:
    """Make torch see the simulated GPU; this is called once and cannot be undone."""
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libc10.*"))))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, GUARDS)
    guards[CUDA] = guards[META]  # a guard that does nothing
    for name, value in GPU.items():
        setattr(torch.cuda, name, value)
    torch.tensor, torch.as_tensor = made(torch.tensor), made(torch.as_tensor)
    torch.inference_mode = NoGrad  # type: ignore[assignment, misc]
    torch.is_inference_mode_enabled = lambda: not torch.is_grad_enabled()
    torch.__future__.set_overwrite_module_params_on_conversion(True)


@contextmanager
def everywhere() -> Iterator[None]:
    """Simulate the GPU in this thread and in all threads that are started within this context."""
    run = threading.Thread.run

    def inside(self: threading.Thread) -> None:
        with Pretending():
            run(self)

    threading.Thread.run = inside  # type: ignore[method-assign]
    try:
        with Pretending():
            yield
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]


def plainly(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a load function of transformers to run without the mode, under which it initialises nothing."""
    run = threading.Thread.run

    def loaded(*args: Any, **options: Any) -> Any:
        inside, threading.Thread.run = threading.Thread.run, run  # type: ignore[method-assign]
        try:
            with _disable_current_modes():
                return load(*args, **options)
        finally:
            threading.Thread.run = inside  # type: ignore[method-assign]

    return loaded


def main(commands: list[list[str]]) -> dict[str, str]:
    """Run commands of `compress` in sequence; returns the failed ones with their errors."""
    import compress
    from compress.cli import app
    from compress_kernels import dispatch

    compress.load("builtin")  # imports what must be imported before `install`
    install()
    dispatch.missing = lambda device: "a GPU that is none"  # type: ignore[assignment]
    compress.load = plainly(compress.load)
    failed: dict[str, str] = {}
    with everywhere():
        for command in commands:
            try:
                app(command, standalone_mode=False)
            except Exception as error:
                failed[" ".join(command)] = f"{type(error).__name__}: {error}"
    return failed


if __name__ == "__main__":
    import json

    asked = json.loads(sys.argv[1]) if sys.argv[1].startswith("[") else [sys.argv[1:]]
    print(json.dumps(main(asked)))
