"""Files are written whole or not at all; videos come back as they were."""

import io

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from paroattn.cli.frames import check_path, save_frames, webp_bytes
from paroattn.files import write_atomically


def smooth_frames(count=5, height=32, width=48):
    """Frames that brighten over time, with a gradient along the width: compression hardly changes them."""
    gradient = torch.linspace(0, 0.5, width).expand(count, 3, height, width)
    return gradient + torch.linspace(0, 0.5, count).view(-1, 1, 1, 1)


def test_write_makes_folders_and_leaves_only_the_file(tmp_path):
    target = tmp_path / "new" / "folder" / "file.txt"
    write_atomically(target, lambda path: path.write_text("text"))
    assert target.read_text() == "text"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def test_failing_write_keeps_the_old_file_and_no_temporary_one(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail(path):
        path.write_text("half of the new")
        raise RuntimeError("disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        write_atomically(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_reader_never_sees_the_file_before_it_is_whole(tmp_path):
    target = tmp_path / "file.txt"

    def write(path):
        path.write_text("text")
        assert not target.exists()
        assert path.suffix == ".txt"

    write_atomically(target, write)
    assert target.exists()


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4", ".MP4"])
def test_saved_video_has_the_frames(tmp_path, suffix):
    frames, path = smooth_frames(), tmp_path / f"video{suffix}"
    save_frames(frames, path, fps=8)
    read = imageio.imread(path, index=None if suffix.lower() == ".mp4" else ...)
    assert read.shape[:3] == (5, 32, 48)
    expected = (frames * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(read[..., :3].astype(float) - expected).mean() < 12
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_webp_bytes_are_an_animation_with_the_frames_duration():
    image = Image.open(io.BytesIO(webp_bytes(smooth_frames(), fps=10)))
    image.load()
    assert (image.format, image.n_frames, image.size, image.info["duration"]) == ("WEBP", 5, (48, 32), 100)


@pytest.mark.parametrize("name", ["video.avi", "video", "video.mp4.txt"])
def test_unknown_suffix_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=r"expected one of \.mp4, \.webp, \.gif"):
        check_path(tmp_path / name)
    with pytest.raises(ValueError, match="no known suffix"):
        save_frames(smooth_frames(), tmp_path / name, fps=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["picture.png", "picture.jpg", "picture.webp"])
def test_a_single_frame_is_an_image_file(tmp_path, name):
    frame = smooth_frames()[:1]
    save_frames(frame, tmp_path / name, fps=8)
    read = torch.from_numpy(imageio.imread(tmp_path / name)).float().reshape(*frame.shape[2:], 3) / 255
    assert (read.permute(2, 0, 1) - frame[0]).abs().mean() < 0.02


def test_kinds_of_files_are_kept_apart(tmp_path):
    with pytest.raises(ValueError, match="image file 'a.mp4' has no known suffix; expected one of .png, .jpg, .webp"):
        check_path(tmp_path / "a.mp4", images=True)
    with pytest.raises(ValueError, match="video file 'a.png' has no known suffix"):
        check_path(tmp_path / "a.png", images=False)
    with pytest.raises(ValueError, match="is an image file; got 2 frames"):
        save_frames(smooth_frames()[:2], tmp_path / "a.png", fps=8)
    assert not list(tmp_path.iterdir())
