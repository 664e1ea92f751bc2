"""The stages of the pipeline, each a module to run from the checkout: `python -m recipes.sft recipes/tiny/sft1.toml`."""

import kernels

if not hasattr(kernels, "accumulation_dtype"):
    raise ImportError(
        f"'kernels' is {kernels.__file__}, another package of that name: run from Komainu's checkout, or uninstall it"
    )
