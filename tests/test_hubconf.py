"""hubconf.py from a local checkout, as torch.hub loads it."""

import subprocess
import sys

import pytest
import torch
from material import ROOT

import loftup


@pytest.mark.parametrize(("entry", "options"), [("loftup", {"backbone": "any"}), ("any", {}), ("tiny", {"views": 4})])
def test_entries_give_what_the_package_gives(entry, options):
    module = torch.hub.load(str(ROOT), entry, source="local", **options)
    if entry == "tiny":
        assert module.views == 4
        return
    expected = loftup.LoftUp.from_pretrained("any").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())


def test_an_unknown_name_is_loftups_own_error():
    with pytest.raises(loftup.LoftUpError, match="dinov2_vits14"):
        torch.hub.load(str(ROOT), "loftup", source="local", backbone="dinov2_vits41")


def test_it_works_where_loftup_is_not_installed(tmp_path):
    program = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [path for path in sys.path if not path.rstrip("/").endswith("src")]
import torch
up = torch.hub.load({str(ROOT)!r}, "any", source="local")
import loftup
print(loftup.__file__)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) in done.stdout


def test_the_package_is_a_command():
    done = subprocess.run([sys.executable, "-m", "loftup", "--version"], capture_output=True, text=True)
    assert done.stdout == f"loftup {loftup.__version__}\n"
