"""``loftup video``: frames in, frames out, in a video and in a folder."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from material import drawn_scene
from PIL import Image

from loftup import viz
from loftup.cli import main

av = pytest.importorskip("av")

OPTIONS = ["--size", "48", "65", "--input", "48", "--views", "1", "--device", "cpu"]


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    scene = np.asarray(drawn_scene(64, 120))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 88, 64, "yuv420p"
        for shift in range(6):
            frame = np.ascontiguousarray(scene[:, 4 * shift : 4 * shift + 88])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path


def frames(path):
    with av.open(str(path)) as container:
        return container.streams.video[0].average_rate, [
            x.to_ndarray(format="rgb24") for x in container.decode(video=0)
        ]


def test_a_video_becomes_a_video(clip, tmp_path, capsys):
    assert main(["video", str(clip), "-o", str(tmp_path / "out.mp4"), *OPTIONS]) == 0
    assert "6 frames: image | bilinear | upsampled" in capsys.readouterr().out
    rate, made = frames(tmp_path / "out.mp4")
    assert rate == Fraction(12)
    assert [x.shape for x in made] == [(48, 194, 3)] * 6  # 195 columns, of which the format takes 194
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "out.mp4"]
    # The left third is the video itself.
    _, source = frames(clip)
    left = np.asarray(Image.fromarray(source[3]).resize((65, 48), Image.Resampling.BICUBIC), float)
    assert np.abs(left[:, :64] - made[3][:, :64]).mean() < 8


def test_a_folder_of_frames_goes_on_where_it_was_cut_off(clip, tmp_path, capsys):
    out = tmp_path / "frames"
    assert main(["video", str(clip), "-o", str(out), "--frames", "2", *OPTIONS]) == 0
    assert main(["video", str(clip), "-o", str(out), *OPTIONS]) == 0
    assert "4 frames" in capsys.readouterr().out.splitlines()[-1]
    whole = tmp_path / "whole"
    assert main(["video", str(clip), "-o", str(whole), "--frames", "6", *OPTIONS]) == 0
    names = [f"{index:06d}.png" for index in range(6)]
    assert sorted(path.name for path in out.glob("*.png")) == names
    # The colours were fitted to two frames in one, to six in the other, and so are alike and not equal.
    for name in names:
        first, second = (np.asarray(Image.open(folder / name), float) for folder in (out, whole))
        assert first.shape == (48, 195, 3)
        assert np.array_equal(first[:, :65], second[:, :65])
        assert np.abs(first - second).mean() < 60
    assert main(["video", str(clip), "-o", str(out), "--fit", "3", *OPTIONS]) == 2
    assert "holds frames of fit 8, got 3" in capsys.readouterr().err


def test_pictures_in_a_folder_and_likeness_to_a_point(tmp_path):
    (tmp_path / "in").mkdir()
    for index in range(2):
        drawn_scene(48, 65).save(tmp_path / "in" / f"{index}.png")
    command = ["video", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--point", "30", "20", *OPTIONS]
    assert main(command) == 0
    made = np.asarray(Image.open(tmp_path / "out" / "000001.png"), int)
    assert made[20, 2 * 65 + 30].min() == 255  # as like itself as can be
    assert np.ptp(made[:, 130:], axis=2).max() == 0  # grey


def test_wrong_uses(clip, tmp_path, capsys):
    for words, message in (
        ([str(tmp_path / "none.mp4"), "-o", str(tmp_path / "a.mp4")], "there is no video"),
        ([str(clip), "-o", str(tmp_path / "a.gif")], "is none of .mp4, .mkv, .mov; a name without a dot is a folder"),
        (
            [str(clip), "-o", str(tmp_path / "a.mp4"), "--point", "999", "2"],
            "--point 999 2 is outside the video's ",
        ),
        ([__file__, "-o", str(tmp_path / "a.mp4")], "as a video"),
    ):
        assert main(["video", *words, *OPTIONS]) == 2
        assert message in capsys.readouterr().err
    # A folder keeps nothing of a run that was refused.
    assert main(["video", str(clip), "-o", str(tmp_path / "frames"), "--point", "999", "2", *OPTIONS]) == 2
    assert not (tmp_path / "frames").exists()
    (tmp_path / "empty").mkdir()
    assert main(["video", str(tmp_path / "empty"), "-o", str(tmp_path / "a.mp4"), *OPTIONS]) == 2
    assert "holds no frames" in capsys.readouterr().err
    assert not list(tmp_path.glob(".loftup*"))


def test_a_pca_is_kept(tmp_path):
    maps = [torch.randn(12, 8, 9), torch.randn(2, 12, 4, 4)]
    pca = viz.PCA.fit(maps)
    colours = viz.pca_image(maps)
    assert torch.allclose(pca.transform(maps[0]), colours[0], atol=1e-6)
    assert torch.allclose(pca.transform(maps[1]), colours[1], atol=1e-6)
    pca.save(tmp_path / "pca.safetensors")
    again = viz.PCA.load(tmp_path / "pca.safetensors")
    assert torch.equal(again.transform(maps[0]), pca.transform(maps[0]))
    with pytest.raises(ValueError, match=r"must be \(B, 12, H, W\) or \(12, H, W\), as the PCA was fitted to"):
        pca.transform(torch.randn(3, 8, 8))
    (tmp_path / "other").write_text("no tensors")
    with pytest.raises(ValueError, match="no PCA that loftup saved"):
        viz.PCA.load(tmp_path / "other")
