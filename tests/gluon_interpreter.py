"""Interpreter of the Gluon kernel for Hopper on the CPU: its partitions are threads, shared memory is arrays.

Triton's interpreter does not support Gluon. This one runs each function of the kernel as plain Python, with substitutes
for `gl`, `mbarrier` and so on. Arithmetic is float32 and products complete when they are issued. It therefore tests
which keys, values and queries are combined, the order of barrier waits (a deadlock raises), and that no access is out
of bounds; not rounding, layouts or races.
"""

from __future__ import annotations

import inspect
import threading
import types
from typing import Any

import numpy as np
import torch

PATIENCE = 20.0  # timeout of a barrier in seconds


class Value(np.ndarray):
    """Scalar or block in a kernel."""

    type = types.SimpleNamespace(layout=None)

    def to(self, kind: Any) -> Value:
        return self.astype(kind if isinstance(kind, type) else np.float32).view(Value)


def value(x: Any) -> Value:
    return np.asarray(x).view(Value)


class Pointer:
    """Pointer into the memory of a tensor, in elements from its first one."""

    def __init__(self, memory: np.ndarray, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=np.float32)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offset + more)


def memory_of(x: torch.Tensor) -> torch.Tensor:
    """Memory behind the first element of a tensor, ignoring its strides."""
    length = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return x.as_strided((length,), (1,))


class Barrier:
    """An mbarrier: a phase completes when all arrivals and all bytes have been counted."""

    lock = threading.Condition()

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phases = 0

    def change(self, arrivals: int, more_bytes: int) -> None:
        with Barrier.lock:
            self.missing -= arrivals
            self.bytes += more_bytes
            assert self.missing >= 0 and self.bytes >= 0, "more arrivals or bytes than a phase has"
            if self.missing == 0 and self.bytes == 0:
                self.phases, self.missing = self.phases + 1, self.count
            Barrier.lock.notify_all()

    def wait(self, parity: Any) -> None:
        with Barrier.lock:
            if not Barrier.lock.wait_for(lambda: self.phases & 1 != int(parity), PATIENCE):
                raise TimeoutError("a program waits for ever")


class Memory:
    """Shared memory: arrays or barriers."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.dtype = np.float32
        self.shape = getattr(data, "shape", None)
        self.layout = None

    def index(self, i: Any) -> Any:
        part = self.data[int(i)]
        return part if isinstance(part, Barrier) else Memory(part)

    def slice(self, first: int, length: int) -> Memory:
        return Memory(self.data[first : first + length])

    def permute(self, order: tuple[int, ...]) -> Memory:
        return Memory(self.data.transpose(order))

    def load(self, layout: Any) -> Value:
        return value(self.data.copy())


class _Mbarrier:
    MBarrierLayout = staticmethod(lambda: "barrier")

    @staticmethod
    def init(bar: Barrier, count: int) -> None:
        bar.count = bar.missing = count

    @staticmethod
    def expect(bar: Barrier, n_bytes: int) -> None:
        bar.change(0, n_bytes)
        bar.change(1, 0)

    @staticmethod
    def arrive(bar: Barrier, count: int = 1) -> None:
        bar.change(count, 0)

    @staticmethod
    def wait(bar: Barrier, phase: Any, pred: Any = True) -> None:
        if pred:
            bar.wait(phase)


def _copy(descriptor: Any, h: Any, x0: Any, x1: Any, x2: Any, bar: Barrier, slot: Memory, first: int, box: Any) -> None:
    """Copy a box to the rows from ``first`` on of a slot; zeros off the tensor. (The kernel copies 64 columns at a
    time.)"""
    base = descriptor.base
    whole = memory_of(base).as_strided(descriptor.shape, descriptor.strides, base.storage_offset())
    corner = [int(x) for x in ((h, x0, x1, x2) if len(box) == 5 else (h, x0))]
    sides = list(box[:-1])
    assert sides == list(descriptor.block_shape)[:-1], "a box of another shape than the descriptor's"
    out = np.zeros((*sides, whole.shape[-1]), np.float32)
    ends = [max(0, min(side, n - c)) for side, n, c in zip(sides, whole.shape, corner, strict=False)]
    part = whole[tuple(slice(c, c + end) for c, end in zip(corner, ends, strict=True))]
    out[tuple(slice(0, end) for end in ends)] = part.float().numpy()
    rows = out.reshape(-1, out.shape[-1])
    slot.data[first : first + len(rows)] = rows
    bar.change(0, -2 * rows.size)


def _load(pointer: Pointer, mask: Any = None, other: Any = None) -> Value:
    places = np.asarray(pointer.offset)
    kept = np.broadcast_to(True if mask is None else np.asarray(mask, bool), places.shape)
    found = np.full(places.shape, 0 if other is None else other, pointer.memory.dtype)
    assert (places[kept] >= 0).all(), "read ahead of a tensor"
    found[kept] = pointer.memory[places[kept]]
    return value(found)


def _store(pointer: Pointer, x: Any, mask: Any = None) -> None:
    places = np.asarray(pointer.offset)
    kept = np.broadcast_to(np.asarray(mask, bool), places.shape)
    assert (places[kept] >= 0).all(), "written ahead of a tensor"
    pointer.memory[places[kept]] = np.broadcast_to(np.asarray(x), places.shape)[kept]


def _product(a: Any, b: Memory, acc: Value, use_acc: Any = True, is_async: bool = False) -> Value:
    left = a.data if isinstance(a, Memory) else np.asarray(a)
    product = left @ b.data
    return value(np.asarray(acc) + product if use_acc else product)


class _Run:
    """State of one launch: the current program, and the runner of partitions."""

    def __init__(self, programs: int) -> None:
        self.programs, self.program, self.errors = programs, 0, []  # type: ignore[var-annotated]

    def specialize(self, partitions: Any, warps: Any, registers: Any) -> None:
        def guarded(function: Any, arguments: Any) -> None:
            try:
                function(*arguments)
            except BaseException as error:
                self.errors.append(error)

        threads = [threading.Thread(target=guarded, args=each) for each in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]


def _language(run: _Run) -> Any:
    def allocate(dtype: Any, shape: list[int], layout: Any) -> Memory:
        if layout == "barrier":
            return Memory([Barrier() for _ in range(shape[0])])
        return Memory(np.full(shape, np.nan, np.float32))  # NaN reveals reads before the copy

    def unary(function: Any) -> Any:
        return lambda x, *axis: value(function(x, *axis))

    def where(condition: Any, x: Any, y: Any) -> Any:
        return (x if condition else y) if isinstance(x, Pointer) else value(np.where(condition, x, y))

    layouts = {name: lambda *_: None for name in ("SliceLayout", "NVMMADistributedLayout", "DotOperandLayout")}
    return types.SimpleNamespace(
        constexpr=lambda x: x, int32=np.int32, int64=np.int64, float32=np.float32, static_range=range,
        load=_load, store=_store, where=where, minimum=lambda x, y: value(np.minimum(x, y)),
        maximum=lambda x, y: value(np.maximum(x, y)), cdiv=lambda x, y: value(-(-x // y)), exp=unary(np.exp),
        exp2=unary(np.exp2), log2=unary(np.log2), abs=unary(np.abs), max=unary(np.max), sum=unary(np.sum),
        arange=lambda first, end, layout=None: value(np.arange(first, end)),
        zeros=lambda shape, dtype, layout: value(np.zeros(shape, np.float32)),
        full=lambda shape, x, dtype, layout: value(np.full(shape, x, np.float32)),
        convert_layout=lambda x, layout: x, static_assert=lambda *_: None,
        inline_asm_elementwise=lambda text, constraints, x, **_: x[0],
        program_id=lambda axis: value(run.program), num_programs=lambda axis: run.programs,
        allocate_shared_memory=allocate, warp_specialize=run.specialize, **layouts,
    )  # fmt: skip


class Interpreted:
    """Stand-in for the kernel: ``Interpreted(kernel, *modules)[(programs,)](...)`` runs the programs in sequence."""

    def __init__(self, kernel: Any, *modules: Any) -> None:
        self.kernel, self.modules, self.launches = kernel, modules, 0

    def __getitem__(self, grid: tuple[int]) -> Any:
        run = _Run(grid[0])
        names: dict[str, Any] = {}
        for module in self.modules:
            names |= vars(module)
        names |= {
            "gl": _language(run), "mbarrier": _Mbarrier, "warpgroup_mma": _product, "synchronize": lambda: None,
            "warpgroup_mma_wait": lambda n, deps: deps[0] if len(deps) == 1 else tuple(deps),
            "fence_async_shared": lambda: None, "LOG2E": np.float32(np.log2(np.e)),
        }  # fmt: skip
        for name, thing in list(names.items()):
            if function := getattr(thing, "fn", None):
                names[name] = types.FunctionType(function.__code__, names, name, function.__defaults__)
        names["_copy"] = _copy

        def launch(*arguments: Any, **options: Any) -> None:
            self.launches += 1
            options.pop("num_warps")
            given = _pointers(arguments)
            for program in range(run.programs):
                run.program = program
                names[self.kernel.fn.__name__](*given, **options)
            place = list(inspect.signature(self.kernel.fn).parameters).index("output")
            for x, pointer in zip(arguments[place], given[place], strict=True):
                if isinstance(x, torch.Tensor):
                    memory_of(x).copy_(torch.from_numpy(pointer.memory))

        return launch


def _pointers(x: Any) -> Any:
    """Pointers instead of tensors, in groups of arguments as well."""
    if isinstance(x, tuple):
        parts = map(_pointers, x)
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return Pointer(_numpy(memory_of(x))) if isinstance(x, torch.Tensor) else x


def _numpy(x: torch.Tensor) -> np.ndarray:
    return (x.float() if x.is_floating_point() else x).numpy()
