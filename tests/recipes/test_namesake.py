"""Komainu works in an environment that also holds Hugging Face's package `kernels`, from which `transformers` imports names."""

import subprocess
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("kernels.layer", "kernels.hugging_face")


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder with an installed package `kernels`, whose modules import one another by that name."""
    package = tmp_path / "kernels"
    (package / "layer").mkdir(parents=True)
    (package / "__init__.py").write_text("from kernels.layer import Mode\n\n__version__ = '0.99.0'\n")
    (package / "layer" / "__init__.py").write_text("class Mode:\n    pass\n")
    information = tmp_path / "kernels-0.99.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.99.0\n")
    return tmp_path


@pytest.fixture
def installed(site, monkeypatch):
    """`kernels` as if just imported, in an environment with that folder."""
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(kernels, "__path__", [str(ROOT / "kernels")])
    monkeypatch.setattr(kernels, "layer", None, raising=False)
    monkeypatch.delattr(kernels, "layer")
    for name in [name for name in sys.modules if name.startswith(FOREIGN)]:
        monkeypatch.delitem(sys.modules, name)
    kernels._hugging_face.cache_clear()
    yield
    kernels._hugging_face.cache_clear()
    for name in [name for name in sys.modules if name.startswith(FOREIGN)]:
        del sys.modules[name]


@pytest.mark.usefixtures("installed")
def test_names_of_hugging_faces_package_are_handed_over():
    from kernels import Mode, __version__, accumulation_dtype, adamw  # type: ignore[attr-defined]

    assert (Mode.__module__, __version__) == ("kernels.layer", "0.99.0")
    # Our own names and modules come first.
    assert accumulation_dtype.__module__ == "kernels"
    assert Path(adamw.__file__).parent == ROOT / "kernels"
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from kernels import nothing  # type: ignore[attr-defined]  # noqa: F401


def test_hugging_faces_package_in_front_of_the_checkout_is_named_in_one_line(site):
    program = f"import sys; sys.path[:0] = [{str(site)!r}, {str(ROOT)!r}]; import recipes"
    ended = subprocess.run([sys.executable, "-c", program], cwd=site, capture_output=True, text=True, check=False)
    expected = f"ImportError: 'kernels' is {site / 'kernels' / '__init__.py'}, another package of that name: run from"
    assert ended.stderr.splitlines()[-1].startswith(expected)
