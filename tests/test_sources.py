"""Where datasets come from: the Hub (an in-memory one), somebody else's dataset object, and broken files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_memory_hub import InMemoryHub, Repository

from wallvla.data.hub import open_dataset
from wallvla.data.items import LeRobotItems
from wallvla.data.lerobot import LeRobotDataset


FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).resolve().parents[1]


# ---- the Hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub():
    hub = InMemoryHub()
    root = FIXTURES / "lerobot_real_v21"
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    hub.repositories["dataset", "lab/arm"] = Repository(files)
    yield hub
    hub.close()


READ_FROM_HUB = """
import json, sys
import numpy as np
from wallvla.data.lerobot import LeRobotDataset
dataset = LeRobotDataset("lab/arm", embodiment="r", action_horizon=3, episodes=[0, 3])
marks = [len(dataset)]
index = int(dataset.episode_bounds[1, 0]) + 5
pixels = {key: dataset.image(index, key) for key in dataset.camera_keys[:1]}
np.savez(sys.argv[1], states=dataset.states, **{"pixels": next(iter(pixels.values()))})
print(json.dumps({"frames": len(dataset), "camera": dataset.camera_keys[0], "root": str(dataset.root)}))
"""


def run_with_hub(code: str, hub: InMemoryHub, tmp_path: Path) -> subprocess.CompletedProcess:
    """Runs code in a new process: `huggingface_hub` reads its settings when it is imported."""
    (tmp_path / "wallvla").symlink_to(ROOT, target_is_directory=True)
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out.npz")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_hub_dataset_downloads_only_what_it_reads(hub, tmp_path):
    done = run_with_hub(READ_FROM_HUB, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    local = LeRobotDataset(FIXTURES / "lerobot_real_v21", embodiment="r", action_horizon=3, episodes=[0, 3])
    assert found["frames"] == len(local)
    arrays = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(arrays["states"], local.states)
    index = int(local.episode_bounds[1, 0]) + 5
    np.testing.assert_array_equal(arrays["pixels"], local.image(index, found["camera"]))
    got = {path.relative_to(found["root"]).as_posix() for path in Path(found["root"]).rglob("*") if path.is_file()}
    assert {name for name in got if name.startswith("videos/")} == {
        f"videos/chunk-000/{found['camera']}/episode_000003.mp4"  # of the one frame that was asked for
    }
    assert {name for name in got if name.startswith("data/")} == {
        f"data/chunk-000/episode_{number:06d}.parquet" for number in (0, 3)
    }


READ_WITHOUT = """
import shutil
import huggingface_hub
from wallvla.data.lerobot import LeRobotDataset
read = lambda: LeRobotDataset("lab/arm", embodiment="r", action_horizon=3, episodes=[0, 3], skip_errors=True)
dataset = read()
print(dataset.skipped)
shutil.rmtree(dataset.root / "data")
huggingface_hub.constants.HF_HUB_OFFLINE = True
try:
    read()
except ConnectionError as error:
    print("stopped:", error)
"""


def test_a_lost_file_is_skipped_and_a_lost_connection_is_not(hub, tmp_path):
    """Ranks that skip what they cannot download would train on different episodes."""
    del hub.repositories["dataset", "lab/arm"].files["data/chunk-000/episode_000003.parquet"]
    done = run_with_hub(READ_WITHOUT, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "{3: 'data/chunk-000/episode_000003.parquet is not in lab/arm at commit" in done.stdout
    assert "stopped: data/chunk-000/episode_000000.parquet of lab/arm cannot be downloaded" in done.stdout


def test_what_is_neither_folder_nor_hub_id(tmp_path):
    for wrong in (tmp_path / "none", "none", "a/b/c", "./none"):
        with pytest.raises(FileNotFoundError, match="does not exist, and .* is not a Hub id"):
            open_dataset(wrong)
    with pytest.raises(ValueError, match="local folder, which has no revision 'main'"):
        open_dataset(tmp_path, "main")


# ---- a dataset object with LeRobot's items -------------------------------------------------------------------------


class Items:
    """What LeRobot's own class yields for the frames of one of our datasets."""

    def __init__(self, dataset: LeRobotDataset, image=lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1) / 255):
        self._dataset, self._image = dataset, image

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, index):
        sample = self._dataset[index]
        images = {key: self._image(pixels) for key, pixels in sample["images"].items()}
        return images | {
            "observation.state": torch.from_numpy(sample["state"]),
            "action": torch.from_numpy(sample["actions"]),
            "action_is_pad": torch.from_numpy(sample["action_is_pad"]),
            "task": sample["instruction"],
            "episode_index": torch.tensor(sample["episode_index"]),
            "frame_index": torch.tensor(sample["frame_index"]),
            "timestamp": torch.tensor(sample["timestamp"]),
            "index": torch.tensor(index),
        }


@pytest.fixture(scope="module")
def images():
    return LeRobotDataset(FIXTURES / "lerobot_real_v3_images", embodiment="r", action_horizon=3, episodes=[0])


@pytest.mark.parametrize(
    "image",
    [
        lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1) / 255,
        lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
        lambda pixels: pixels,
    ],
    ids=["float", "uint8", "channels last"],
)
def test_items_become_the_same_samples(images, image):
    items = LeRobotItems(Items(images, image), embodiment="r", action_horizon=3)
    assert len(items) == len(images) and items.camera_keys == images.camera_keys
    for index in (0, 7, len(images) - 1):
        found, expected = items[index], images[index]
        assert found.pop("timestamp") == pytest.approx(expected.pop("timestamp"))
        np.testing.assert_equal(found, expected)


def test_item_errors(images):
    good = Items(images)
    with pytest.raises(ValueError, match="have no camera side; they have observation.images.front"):
        LeRobotItems(good, embodiment="r", action_horizon=3, cameras=["side"])
    with pytest.raises(ValueError, match="must be a chunk of 5 steps. Make the dataset with delta_timestamps"):
        LeRobotItems(good, embodiment="r", action_horizon=5)
    with pytest.raises(ValueError, match="have no qpos; they have"):
        LeRobotItems(good, embodiment="r", action_horizon=3, state_key="qpos")
    bright = LeRobotItems(
        Items(images, lambda p: torch.from_numpy(p).float()), embodiment="r", action_horizon=3, cameras=["front"]
    )
    with pytest.raises(ValueError, match="floats are between 0 and 1"):
        bright[0]


# ---- broken metadata -----------------------------------------------------------------------------------------------

KEYS = (
    "codebase_version", "fps", "features", "total_episodes", "total_frames", "data_path", "video_path", "chunks_size",
)  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2000), st.floats(allow_nan=True), st.text(max_size=8),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return Path(shutil.copytree(FIXTURES / "lerobot_conv_v30", tmp_path_factory.mktemp("fuzz") / "d"))


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    return Path(shutil.copytree(FIXTURES / "lerobot_real_v3_h264", tmp_path_factory.mktemp("fuzz") / "d"))


def read_all(root: Path, cameras=()):
    dataset = LeRobotDataset(root, embodiment="r", action_horizon=2, cameras=list(cameras))
    return [dataset[index] for index in (0, len(dataset) - 1)]


fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(st.sampled_from(KEYS), VALUES)
def test_fuzzed_info_is_read_or_refused_with_a_reason(scratch, key, value):
    path = scratch / "meta" / "info.json"
    original = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(original) | {key: value}))
        try:
            read_all(scratch)
        except (ValueError, FileNotFoundError) as error:
            assert len(str(error)) > 20  # says what is wrong; any other exception fails the test
    finally:
        path.write_text(original)


@fuzz
@given(st.sampled_from(["meta/info.json", "meta/tasks.parquet", "episodes"]), st.data())
def test_damaged_bytes_are_read_or_refused_with_a_reason(scratch, name, data):
    path = next((scratch / "meta" / "episodes").rglob("*.parquet")) if name == "episodes" else scratch / name
    original = path.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    if data.draw(st.booleans()):
        damaged = original[:place]
    else:
        damaged = original[:place] + bytes([original[place] ^ data.draw(st.integers(1, 255))]) + original[place + 1 :]
    try:
        path.write_bytes(damaged)
        try:
            read_all(scratch)
        except (ValueError, FileNotFoundError) as error:
            assert len(str(error)) > 20
    finally:
        path.write_bytes(original)


CELLS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**62), 2**62), st.floats(), st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
)  # fmt: skip


def assert_read_or_refused(root: Path, cameras=()):
    """Any exception but these two fails the test; what is read is complete."""
    try:
        samples = read_all(root, cameras)
    except (ValueError, FileNotFoundError) as error:
        assert len(str(error)) > 20
        return
    for sample in samples:
        assert isinstance(sample["instruction"], str)
        assert np.isfinite(sample["state"]).all() and np.isfinite(sample["actions"]).all()
        assert isinstance(sample["episode_index"], int) and sample["episode_index"] >= 0


@fuzz
@given(st.sampled_from(["episodes", "tasks", "data", "episodes with a camera"]), CELLS, st.data())
def test_fuzzed_cells_are_read_or_refused_with_a_reason(scratch, filmed, name, value, data):
    """One cell of a table becomes something else, so its column changes type where it must, as pandas would do it."""
    root, cameras = (filmed, ["wrist"]) if name.endswith("camera") else (scratch, [])
    folder = {"tasks": "meta", "data": "data"}.get(name, "meta/episodes")
    path = next((root / folder).rglob("tasks.parquet" if name == "tasks" else "*.parquet"))
    original = path.read_bytes()
    table = pq.read_table(path)
    names = [name for name in table.column_names if not name.startswith("stats/")]  # nobody reads these
    column = data.draw(st.sampled_from(names))
    cells = table[column].to_pylist()
    cells[data.draw(st.integers(0, len(cells) - 1))] = value
    try:
        changed = pa.array(cells)
    except (pa.ArrowException, OverflowError):
        changed = pa.array([str(cell) for cell in cells])
    try:
        pq.write_table(table.set_column(table.column_names.index(column), column, changed), path)
        assert_read_or_refused(root, cameras)
    finally:
        path.write_bytes(original)


@fuzz
@given(st.sampled_from(["dtype", "shape", "info", "names"]), CELLS, st.data())
def test_fuzzed_features_are_read_or_refused_with_a_reason(scratch, key, value, data):
    path = scratch / "meta" / "info.json"
    original = path.read_text()
    info = json.loads(original)
    feature = data.draw(st.sampled_from(sorted(info["features"])))
    info["features"][feature] |= {key: value}
    try:
        path.write_text(json.dumps(info))
        assert_read_or_refused(scratch)
    finally:
        path.write_text(original)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    root = Path(shutil.copytree(FIXTURES / "lerobot_real_v21", tmp_path_factory.mktemp("fuzz") / "old"))
    # As if only those episodes had been recorded whose data the fixture holds.
    lines = [json.loads(line) for line in (root / "meta" / "episodes.jsonl").read_text().splitlines()]
    kept = [each for each in lines if (root / f"data/chunk-000/episode_{each['episode_index']:06d}.parquet").is_file()]
    info = json.loads((root / "meta" / "info.json").read_text())
    info |= {"total_episodes": len(kept), "total_frames": sum(each["length"] for each in kept)}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    (root / "meta" / "episodes.jsonl").write_text("\n".join(map(json.dumps, kept)))
    read_all(root)
    return root


@fuzz
@given(st.sampled_from(["episodes", "tasks"]), CELLS, st.data())
def test_fuzzed_lines_of_the_old_format_are_read_or_refused_with_a_reason(old, name, value, data):
    path = old / "meta" / f"{name}.jsonl"
    original = path.read_text()
    lines = [json.loads(line) for line in original.splitlines()]
    line = data.draw(st.integers(0, len(lines) - 1))
    if data.draw(st.booleans()):
        lines[line][data.draw(st.sampled_from(sorted(lines[line])))] = value
    else:
        lines[line] = value
    try:
        path.write_text("\n".join(map(json.dumps, lines)))
        assert_read_or_refused(old)
    finally:
        path.write_text(original)
