"""Videos that are named without a suffix, or lie as folders of pictures."""

import numpy as np
import pytest
from PIL import Image

from lmm_jax.data.frames import FrameFolder, video_file
from lmm_jax.errors import UserError


def test_all_pictures_in_the_order_of_their_names(tmp_path):
    for i, name in enumerate(("b.png", "a.JPG", "c.jpeg")):
        Image.new("RGB", (4 + i, 3), (i, 0, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no frame")
    with FrameFolder(tmp_path) as frames:
        assert len(frames) == 3
        shapes = [frame.shape for frame in frames]
        assert shapes == [(3, 5, 3), (3, 4, 3), (3, 6, 3)]  # none is squashed
        assert all(frame.dtype == np.uint8 for frame in frames)  # and they can be read again


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(UserError, match="it is no video"):
        FrameFolder(tmp_path)


@pytest.mark.parametrize("named", ["v", "v.pkl", "v.mkv"])
def test_a_video_by_its_name(tmp_path, named):
    (tmp_path / "v.mkv").touch()
    assert video_file(str(tmp_path / named)) == str(tmp_path / "v.mkv")
    assert video_file(str(tmp_path / "w")) == str(tmp_path / "w")
