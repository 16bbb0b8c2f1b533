"""Features on disk: the right ones, whole ones, or none."""

import logging

import pytest
import torch
from torch import nn

from loftup import Backbone, LoftUpError
from loftup.train.config import TrainConfig
from loftup.train.data.cache import FeatureCache, fingerprint, open_caches


def backbone(**options):
    torch.manual_seed(1)
    settings = {"channels": 4, "patch_size": 2, "name": "small", **options}
    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4)).eval()
    return Backbone(model, model, **settings).eval()


def config(folder, views=2, **options):
    made = TrainConfig(**options)
    made.data.cache, made.data.views = str(folder), views
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_written_is_read_bit_for_bit(tmp_path, dtype):
    cache, features = FeatureCache(tmp_path / "new"), torch.randn(2, 4, 3, 5).to(dtype)
    key = cache.key(torch.rand(3, 8, 8))
    assert cache.read(key) is None
    cache.write(key, features[1].mT)  # not contiguous
    found = cache.read(key)
    assert found.dtype == dtype
    assert found.equal(features[1].mT)
    assert [file.name for file in (tmp_path / "new").rglob("*") if file.is_file()] == [f"{key}.safetensors"]


def test_keys_are_of_the_pixels(tmp_path):
    cache, image = FeatureCache(tmp_path), torch.rand(3, 8, 8)
    changed = image.clone()
    changed[2, 7, 7] += 1 / 255
    assert cache.key(image) == cache.key(image.clone()) == cache.key(image.flip(-1).flip(-1))
    assert len({cache.key(x) for x in (image, changed, image.flip(-1), image.view(3, 4, 16))}) == 4


@pytest.mark.parametrize("damage", [b"", b"\x08", b"nonsense" * 10, None])
def test_a_damaged_entry_is_none_and_said(tmp_path, caplog, damage):
    cache, key = FeatureCache(tmp_path), "ab" * 20
    cache.write(key, torch.randn(4, 3, 3))
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8] if damage is None else damage)
    with caplog.at_level(logging.WARNING, logger="loftup"):
        assert cache.read(key) is None
    assert f"{file} is damaged" in caplog.text
    assert "computed anew" in caplog.text
    cache.write(key, torch.ones(4, 3, 3))
    assert cache.read(key).equal(torch.ones(4, 3, 3))


def test_an_entry_of_something_else_is_damaged(tmp_path, caplog):
    from safetensors.torch import save_file

    cache, key = FeatureCache(tmp_path), "cd" * 20
    (tmp_path / "cd").mkdir()
    save_file({"other": torch.zeros(2)}, tmp_path / "cd" / f"{key}.safetensors")
    assert cache.read(key) is None
    assert "is damaged" in caplog.text


def test_an_entry_that_cannot_be_read_is_an_error_with_its_name(tmp_path):
    cache, key = FeatureCache(tmp_path), "ab" * 20
    (tmp_path / "ab" / f"{key}.safetensors").mkdir(parents=True)
    with pytest.raises(LoftUpError, match=r"cannot read features from .*abab\.safetensors: Is a directory; .*cache"):
        cache.read(key)


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    import os

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        LoftUpError, match=r"cannot write features to .*ef\.safetensors: No space left on device; make room"
    ):
        FeatureCache(tmp_path).write("ef" * 20, torch.zeros(2))
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


class TestFingerprint:
    def test_weights_and_settings_decide(self):
        made = [
            backbone(),
            backbone(name="other"),
            backbone(layer=1),
            backbone(patch_size=4, check=False),
            backbone(mean=(0, 0, 0)),
            backbone(std=(1, 1, 1)),
            backbone(views=4),
        ]
        changed = backbone()
        with torch.no_grad():
            changed.model[0].bias[0] += 1e-6
        statistics = backbone()
        statistics.model[1].running_mean[3] = 0.5
        digests = [fingerprint(b) for b in (*made, changed, statistics)]
        digests += [fingerprint(backbone(), {"output_stride": 16}), fingerprint(backbone().bfloat16())]
        assert len(set(digests)) == len(digests)
        assert fingerprint(backbone()) == digests[0]

    def test_precision_and_options_have_their_own_folders(self, tmp_path):
        other = config(tmp_path)
        other.backbone.options = {"output_stride": 16}
        caches = [
            *open_caches(config(tmp_path), [backbone()]),
            *open_caches(config(tmp_path, precision="bfloat16"), [backbone()]),
            *open_caches(other, [backbone()]),
            *open_caches(config(tmp_path), [backbone(name="other")]),
        ]
        folders = [cache.folder for cache in caches]
        assert len(set(folders)) == 4
        assert {folder.parent for folder in folders} == {tmp_path}
        (again,) = open_caches(config(tmp_path, seed=5), [backbone()])
        assert again.folder == folders[0]


def test_no_cache_is_opened_where_none_is_wanted():
    assert open_caches(TrainConfig(), [backbone()]) == []
