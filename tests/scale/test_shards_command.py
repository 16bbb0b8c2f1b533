"""`loftup features` into shards."""

import pytest
from photos import photos

import loftup
from loftup.cli import main

QUICK = ["--backbone", "tiny", "--weights", "any", "--input", "64", "--device", "cpu"]


def test_shards_and_their_messages(tmp_path, capsys):
    album, out = photos(tmp_path / "photos", 5), tmp_path / "out"
    (album / "004.jpg").write_bytes(b"x")
    words = ["features", str(album), "-o", str(out), *QUICK, "--save", "features,pooled", "--part", "2"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "4 of 5 pictures are in" in said
    assert "1 failed, named in" in said
    assert len(loftup.open(out)) == 4
    assert main(words) == 1
    assert "5 of 5 pictures are finished already" in capsys.readouterr().err
    (album / "004.jpg").unlink()
    photos(tmp_path / "other", 5)
    (tmp_path / "other" / "004.jpg").rename(album / "004.jpg")
    assert main([*words, "--retry-errors"]) == 0


def test_a_dry_run_says_what_all_would_take(tmp_path, capsys):
    album = photos(tmp_path / "photos", 7)
    assert main(["features", str(album), *QUICK, "--dry-run", "--workers", "4", "--price", "2.5"]) == 0
    said = capsys.readouterr().out
    assert "7 pictures, 7 of them tried" in said
    assert "4 workers: 0.9 * 4 /" in said
    assert "* 2.5 an hour =" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--part", "3"], "--part goes with shards; give --format parquet or --engine ray too"),
        (["--format", "parquet", "--overwrite"], "--overwrite is for a file for every picture"),
        (["--format", "parquet", "--workers", "2"], "--workers goes with --engine ray, got --engine local"),
        (["--format", "parquet", "--save", "pixels"], "save must be some of features"),
        (["--format", "parquet", "--price", "1"], "--price goes with --dry-run"),
        (["--engine", "ray", "--device", "cuda"], "--device goes with --engine local"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, words, text):
    quick = [word for word in QUICK if word not in ("--device", "cpu")]
    assert main(["features", str(photos(tmp_path / "p", 1)), "-o", str(tmp_path / "out"), *quick, *words]) == 2
    assert text in capsys.readouterr().err


def test_no_output(tmp_path, capsys):
    assert main(["features", str(photos(tmp_path / "p", 1)), *QUICK]) == 2
    assert "-o is missing" in capsys.readouterr().err
