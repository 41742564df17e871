"""Pictures of records on the page; the most frames of a video."""

import io

import numpy as np
import pytest
from eval_fixtures import Place
from PIL import Image

from lmm_jax.demo.dataset import write_test_set
from lmm_jax.errors import UserError
from lmm_jax.evaluation.registry import benchmarks
from lmm_jax.evaluation.stills import FRAMES, Pictures, stills


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_test_set(folder / "demo_small", images=2, clips=1, seed=4)
    return folder


def test_pictures_and_frames(world):
    pictures = Pictures({}, world)
    records = benchmarks()["demo_small"].records(world / "demo_small")
    assert pictures("demo_small", 0) == [world / "demo_small" / "images" / "000000.png"]
    frames = pictures("demo_small", records[-1].key)
    arrays = [np.asarray(Image.open(io.BytesIO(f))) for f in frames]
    assert len(arrays) == FRAMES and all(a.ndim == 3 for a in arrays) and any((a != arrays[0]).any() for a in arrays[1:])
    assert pictures("demo_small", 10**6) == []


def test_data_that_is_not_at_hand(tmp_path, capsys):
    pictures = Pictures({"pope": tmp_path / "nowhere"}, tmp_path)
    assert pictures("pope", 0) == pictures("demo", 0) == [] and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.count("no pictures of") == 2


def test_a_folder_of_frames_and_a_broken_video(tmp_path):
    for i in range(9):
        Image.new("RGB", (600, 300), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    found = [Image.open(io.BytesIO(f)) for f in stills(str(tmp_path))]
    assert len(found) == FRAMES and all(f.size == (448, 224) for f in found)
    assert sorted(f.getpixel((5, 5)) for f in found) == [f.getpixel((5, 5)) for f in found]
    (tmp_path / "x.mp4").write_bytes(b"no video")
    with pytest.raises(UserError):
        stills(str(tmp_path / "x.mp4"))


def test_long_videos_of_mvbench_and_mlvu_are_thinned(tmp_path, capsys):
    """Evaluation spec section 2."""
    place = Place(tmp_path, capsys)
    for fixture, name in (("mvbench", "mvbench"), ("mlvu", "mlvu"), ("egoschema", "egoschema")):
        folder = place.lay(fixture)
        most = {r.most_frames for r in benchmarks()[name].records(folder)}
        assert most == ({None} if name == "egoschema" else {1000})
