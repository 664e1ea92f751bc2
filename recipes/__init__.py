"""The stages of the pipeline, one module a command, run from the checkout: `python -m recipes.sft recipes/tiny/sft1.toml`.

The manual is README.md beside this file.
"""

import os

# OpenMP reads this when torch is imported. Waiting threads would otherwise spin, and slow a run on a CPU several times as soon
# as another program wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import kernels

if not hasattr(kernels, "accumulation_dtype"):
    raise ImportError(
        f"'kernels' is {kernels.__file__}, another package of that name: run from Komainu's checkout, or uninstall it"
    )
