"""Triton's interpreter without what costs half of its time and has no effect."""

import dataclasses
from collections.abc import Callable

import triton
from triton.runtime import interpreter


def lighten() -> None:
    """From now on in this process, where the version of Triton is the one whose inner parts these are; others are slower."""
    if not triton.__version__.startswith("3.9."):
        return
    # The interpreter drops the assertions that there was no overflow, for which it computes all integers a second time.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    # Replaces the language's functions whenever a kernel calls a function: once for each module is enough in a launch.
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_once(function: Callable):
        module = function.__globals__["__name__"]
        if module in patched:
            return None
        patched.add(module)
        return patch(function)

    def launch_anew(self, *arguments, **keywords):
        patched.clear()
        return launch(self, *arguments, **keywords)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
