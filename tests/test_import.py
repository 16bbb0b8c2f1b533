"""`import loftup` is light, and the check can fail."""

import subprocess
import sys

import pytest

import loftup

HEAVY = ("torch", "timm", "transformers", "open_clip", "matplotlib", "PIL", "triton", "huggingface_hub")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_loads_nothing_heavy():
    assert loaded_by("import loftup, loftup.cli") == set()


def test_the_model_needs_torch_alone():
    assert loaded_by("from loftup import LoftUp, load_backbone, list_pretrained") <= {"torch", "triton"}


def test_the_check_notices_a_heavy_import():
    assert "timm" in loaded_by("import timm")


def test_every_public_name_resolves():
    for name in loftup.__all__:
        assert getattr(loftup, name) is not None
    assert set(loftup.__all__) <= set(dir(loftup))


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'LoftDown'"):
        loftup.LoftDown  # noqa: B018
