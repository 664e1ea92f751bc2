import pytest

from engine.inference import endpoint


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    """Tries follow one another at once, not after half a second and more."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
