"""The stages of the pipeline, one module a command, run from the checkout: `python -m recipes.sft recipes/tiny/sft1.toml`.

The manual is README.md beside this file.
"""

import kernels

if not hasattr(kernels, "accumulation_dtype"):
    raise ImportError(
        f"'kernels' is {kernels.__file__}, another package of that name: run from Komainu's checkout, or uninstall it"
    )
