"""A stand-in for a device without float64 (Metal, DirectML, many Intel GPUs), on a machine that has none.

It is a backend of torch's own kind, PrivateUse1, whose tensors keep their numbers in the main memory: libraries see a
device that is neither the CPU nor CUDA, and every operation is checked.  Refused are what such devices refuse: float64,
generators of another device, and tensors of two devices in one operation.  Refused are also two things that Metal does
wrong in silence: copies from the main memory that wait for nothing, and conversions to float64 on the way to the CPU.

It cannot tell what torch has not implemented on a real device, nor how precise that is; and what other libraries do
only for a device called "mps" or "xpu" does not happen.
"""

import functools

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "nodouble"
_MAY_MIX = ("copy_", "index", "index_put", "index_put_", "_index_put_impl_")


class Float32Tensor(torch.Tensor):
    """A tensor of the device; ``inner`` has its numbers, on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        # in inference mode whole operations come, such as ``to``
        parts = operation.decompose(*args, **(kwargs or {}))
        return _run(operation, args, kwargs or {}) if parts is NotImplemented else parts

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self):
        return self.detach().cpu().tolist()

    def __repr__(self):
        return f"Float32Tensor({self.detach().cpu()})"

    def __format__(self, spec):
        return format(self.item(), spec) if self.ndim == 0 else repr(self)


_TORCHS_GENERATOR = torch.Generator
_of_the_device = {}  # generators by address, because torch hands on no subclass


class Generator(torch.Generator):
    """What the tests put in the place of ``torch.Generator``, which cannot make one of the device."""

    def __new__(cls, device="cpu"):
        is_ours = torch.device(device).type == NAME
        made = super().__new__(cls, "cpu" if is_ours else device)
        if is_ours:
            _of_the_device[made._cdata] = made
        return made

    @property
    def device(self):
        return device_of(self)


def device_of(generator):
    if generator._cdata in _of_the_device:
        return torch.device(NAME, 0)
    return _TORCHS_GENERATOR.device.__get__(generator)


class _Module(backend_registration._DummyBackendModule):
    """torch.nodouble; its numbers are drawn by the CPU's generator.

    It says that it is not available, so that tests after these, in the same process, take no notice.
    """

    def is_available(self):
        return False

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        pass

    def synchronize(self, device=None):
        pass

    def empty_cache(self):
        pass


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self):
        return False


# what makes a tensor by resizing another, and what torch.tensor calls past the fallback
_DIRECT = ("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm",
           "randperm.generator", "copy_", "_local_scalar_dense")  # fmt: skip
_kept = []  # registrations, which end with their objects


@functools.cache
def make_device():
    """The device, which torch knows from now on, for the rest of the process; None if this torch cannot."""
    if torch.cuda.is_available() or not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return None  # a process has one accelerator
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
    every, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(lambda operation, *args, **kwargs: _run(operation, args, kwargs), "PrivateUse1")
    for name in _DIRECT:
        operation = getattr(getattr(torch.ops.aten, name.split(".")[0]), (name + ".default").split(".")[1])
        some.impl(name, lambda *args, _=operation, **kwargs: _run(_, args, kwargs), "PrivateUse1")
    _kept.extend((every, some))
    return torch.device(NAME, 0)


def _run(operation, args, kwargs):
    name, leaves = operation._schema.name.removeprefix("aten::"), tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, Float32Tensor)]
    others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Float32Tensor)]
    device = kwargs.get("device")
    goes_there = torch.device(device).type == NAME if device is not None else bool(ours)
    _check(operation, name, args, kwargs, ours, others, goes_there)
    owners = {id(leaf.inner): leaf for leaf in ours}

    def inside(leaf):
        if isinstance(leaf, Float32Tensor):
            return leaf.inner
        return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == NAME else leaf

    def outside(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in owners:  # changed in place
            return owners[id(leaf)]
        if not goes_there:
            return leaf
        if leaf.dtype == torch.float64:
            raise TypeError(f"{NAME} has no float64 ({operation})")
        return Float32Tensor(leaf)

    if name == "copy_" and not isinstance(args[0], Float32Tensor):
        args[0].copy_(args[1].inner)
        return args[0]
    return tree_map(outside, operation(*tree_map(inside, args), **tree_map(inside, kwargs)))


def _check(operation, name, args, kwargs, ours, others, goes_there):
    if name in ("copy_", "_to_copy"):
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        source = args[1] if name == "copy_" else args[0]
        if goes_there and not isinstance(source, Float32Tensor) and not waits:
            raise RuntimeError(f"a copy from the main memory to {NAME} does not wait: its numbers may be gone by then")
        dtype = args[0].dtype if name == "copy_" else kwargs.get("dtype")
        if isinstance(source, Float32Tensor) and dtype == torch.float64:
            raise TypeError(f"{NAME} has no float64, and converts before it copies")
        return
    if kwargs.get("dtype") == torch.float64 and goes_there:
        raise TypeError(f"{NAME} has no float64 ({operation})")
    if ours and name not in _MAY_MIX and any(other.ndim and other.numel() for other in others):
        raise RuntimeError(f"{operation} has tensors on {NAME} and on {others[0].device}")
    generator = kwargs.get("generator")
    if goes_there and generator is not None and (place := device_of(generator)).type != NAME:
        raise RuntimeError(f"{operation} has a generator of {place} for a tensor on {NAME}")
