"""The data room: LeRobot reading and writing, statistics, multimodal files, mixtures, collation."""

import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from wallvla.action_space_wallvla import Embodiment
from wallvla.data.collator import Collator
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.lerobot_writer import ImageHistogram, LeRobotWriter
from wallvla.data.mixture import CoTrainingMixture, compose, drop_state, random_shift
from wallvla.data.multimodal import MultimodalDataset, MultimodalWriter
from wallvla.data.statistics import compute_statistics
from wallvla.processing_wallvla import WallVLAProcessor


FIXTURES = Path(__file__).parent / "fixtures"
FPS = 20
SIZE = 64
CAMERAS = ("observation.images.front", "observation.images.wrist")
FEATURES = {camera: {"dtype": "video", "shape": (SIZE, SIZE, 3)} for camera in CAMERAS} | {
    "observation.state": {"dtype": "float32", "shape": (5,), "names": list("abcde")},
    "action": {"dtype": "float32", "shape": (3,)},
    "next.done": {"dtype": "bool", "shape": (1,)},
    "note": {"dtype": "string", "shape": (1,)},
}
TASKS = ("open the drawer", "close the window", "open the drawer")
LENGTHS = (7, 23, 12)


def coded_frame(number: int, camera: int) -> np.ndarray:
    """A smooth image that says which frame it is: 4 x 4 blocks, one bit each, dark or bright."""
    bits = [(number >> bit) & 1 for bit in range(15)] + [camera]
    blocks = np.reshape(bits, (4, 4)) * 120 + 60
    pixels = np.kron(blocks, np.ones((SIZE // 4, SIZE // 4)))[..., None] + np.array([0, 20, 40])
    ramp = np.linspace(0, 15, SIZE)[None, :, None]
    return (pixels + ramp).astype(np.uint8)


def decoded_number(pixels: np.ndarray) -> tuple[int, int]:
    blocks = pixels.mean(axis=2).reshape(4, SIZE // 4, 4, SIZE // 4).mean(axis=(1, 3))
    bits = (blocks.ravel() > 147).astype(int)
    return int(bits[:15] @ (1 << np.arange(15))), int(bits[15])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def random_episodes(seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "observation.state": rng.normal(size=(length, 5)).astype(np.float32),
            "action": rng.normal(size=(length, 3)).astype(np.float32),
        }
        for length in LENGTHS
    ]


def write(root: Path, episodes: list[dict[str, np.ndarray]], **options) -> Path:
    number = 0
    with LeRobotWriter(root, fps=FPS, features=FEATURES, robot_type="test", **options) as writer:
        for task, episode in zip(TASKS, episodes, strict=True):
            length = len(episode["action"])
            for step in range(length):
                frame = {name: values[step] for name, values in episode.items()}
                frame |= {camera: coded_frame(number, c) for c, camera in enumerate(CAMERAS)}
                writer.add_frame(frame | {"next.done": step == length - 1, "note": f"step {step}"})
                number += 1
            writer.save_episode(task)
    return root


def read(root: Path, **options) -> LeRobotDataset:
    return LeRobotDataset(root, **({"embodiment": "robot", "action_horizon": 4} | options))


@pytest.fixture(scope="module")
def episodes():
    return random_episodes()


@pytest.fixture(scope="module")
def video_root(tmp_path_factory, episodes):
    return write(tmp_path_factory.mktemp("data") / "video", episodes)


@pytest.fixture
def damaged(tmp_path, video_root):
    """A copy of the video dataset that a test may break."""
    return Path(shutil.copytree(video_root, tmp_path / "damaged"))


def check_against(dataset: LeRobotDataset, episodes, *, exact: bool):
    """Every sample equals what was written."""
    assert len(dataset) == sum(LENGTHS) and dataset.num_episodes == len(LENGTHS)
    index = 0
    for e, episode in enumerate(episodes):
        assert dataset.episode_bounds[e].tolist() == [index, index + LENGTHS[e]]
        for step in range(LENGTHS[e]):
            sample = dataset[index]
            assert sample["instruction"] == TASKS[e]
            assert sample["embodiment"] == "robot"
            assert (sample["episode_index"], sample["frame_index"]) == (e, step)
            assert sample["timestamp"] == pytest.approx(step / FPS)
            np.testing.assert_array_equal(sample["state"], episode["observation.state"][step])
            ahead = np.arange(step, step + 4)
            np.testing.assert_array_equal(sample["actions"], episode["action"][np.minimum(ahead, LENGTHS[e] - 1)])
            assert sample["action_is_pad"].tolist() == (ahead >= LENGTHS[e]).tolist()
            for c, camera in enumerate(CAMERAS):
                pixels = sample["images"][camera]
                assert pixels.dtype == np.uint8 and pixels.shape == (SIZE, SIZE, 3)
                assert decoded_number(pixels) == (index, c)
                if exact:
                    np.testing.assert_array_equal(pixels, coded_frame(index, c))
                else:
                    assert psnr(pixels, coded_frame(index, c)) > 30
            index += 1


# ---- writer and reader -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gop": 10, "preset": "veryfast"},
        {"data_file_size_mb": 0.001, "video_file_size_mb": 0.001, "files_per_chunk": 2},
    ],
    ids=["one file", "long gop", "many files"],
)
def test_reader_returns_what_was_written_as_video(tmp_path, episodes, options):
    root = write(tmp_path / "dataset", episodes, **options)
    check_against(read(root), episodes, exact=False)
    if "files_per_chunk" in options:
        assert sorted(p.relative_to(root).as_posix() for p in root.glob("data/*/*")) == [
            "data/chunk-000/file-000.parquet", "data/chunk-000/file-001.parquet", "data/chunk-001/file-000.parquet",
        ]  # fmt: skip
        assert len(list(root.glob(f"videos/{CAMERAS[0]}/*/*.mp4"))) == 3


@pytest.mark.parametrize("size_mb", [100, 0.001], ids=["one file", "many files"])
def test_reader_returns_what_was_written_as_images(tmp_path, episodes, size_mb):
    root = write(tmp_path / "dataset", episodes, use_videos=False, data_file_size_mb=size_mb, files_per_chunk=2)
    check_against(read(root), episodes, exact=True)
    assert not (root / "videos").exists()


def test_cameras_of_one_dataset_are_sharded_independently(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 8, 32, 32, 3), dtype=np.uint8)
    features = {
        "busy": {"dtype": "video", "shape": (32, 32, 3)},
        "calm": {"dtype": "video", "shape": (32, 32, 3)},
        "observation.state": {"dtype": "float32", "shape": (1,)},
        "action": {"dtype": "float64", "shape": (2,)},
    }
    with LeRobotWriter(tmp_path / "d", fps=10, features=features, video_file_size_mb=0.02, crf=10) as writer:
        for e in range(3):
            for step in range(8):
                calm = np.full((32, 32, 3), 60 * e + 6 * step, np.uint8)
                writer.add_frame(
                    {"busy": noise[e, step], "calm": calm, "observation.state": float(e), "action": [e, step]}
                )
            writer.save_episode("wave")
    assert len(list((tmp_path / "d" / "videos" / "busy").rglob("*.mp4"))) == 3
    assert len(list((tmp_path / "d" / "videos" / "calm").rglob("*.mp4"))) == 1
    dataset = read(tmp_path / "d", cameras=["calm", "busy"])
    for index in np.random.default_rng(1).permutation(len(dataset)):
        sample = dataset[index]
        assert abs(sample["images"]["calm"].mean() - (60 * (index // 8) + 6 * (index % 8))) < 3
        assert sample["state"].shape == (1,) and sample["state"][0] == index // 8
        distances = [
            np.abs(sample["images"]["busy"].astype(int) - frame).mean() for frame in noise.reshape(24, 32, 32, 3)
        ]
        assert np.argmin(distances) == index


def test_random_access_equals_sequential_access(video_root):
    dataset = read(video_root)
    frames = [dataset[i]["images"] for i in range(len(dataset))]
    for index in np.random.default_rng(0).integers(len(dataset), size=150):
        for camera, pixels in dataset[index]["images"].items():
            np.testing.assert_array_equal(pixels, frames[index][camera])


@pytest.mark.parametrize("name", ["lerobot_real_v3_h264", "lerobot_real_v3"])
def test_any_order_of_access_gives_the_same_frames(name):
    """B-frames and keyframes 10 apart (h264), AV1: a jump skips what nothing refers to and must not miss it later."""
    dataset = read(FIXTURES / name, cameras=["wrist" if name.endswith("h264") else "front"], episodes=[0, 7])
    camera, rng = dataset.camera_keys[0], np.random.default_rng(0)
    frames = [dataset.image(i, camera) for i in range(len(dataset))]
    assert len({frame.tobytes() for frame in frames}) > 0.9 * len(frames)  # a neighbour would be noticed
    steps = rng.choice(
        [-7, -2, -1, 0, 1, 2, 3, 8, 15, 60], size=150
    )  # backward, again, forward, within a GOP and beyond
    for index in np.cumsum(steps) % len(dataset):
        np.testing.assert_array_equal(dataset.image(int(index), camera), frames[index])


def test_frames_in_memory_equals_decoding(video_root):
    decoded, kept = read(video_root), read(video_root, frames_in_memory=True)
    for index in range(len(decoded)):
        for camera in CAMERAS:
            np.testing.assert_array_equal(decoded[index]["images"][camera], kept[index]["images"][camera])
    kept[3]["images"][CAMERAS[0]][:] = 0  # what a sample holds is the caller's
    assert kept[3]["images"][CAMERAS[0]].any()


def test_frames_in_memory_checks_the_memory_first(video_root, monkeypatch):
    monkeypatch.setattr("wallvla.data.lerobot._free_memory_bytes", lambda: 1000)
    with pytest.raises(ValueError, match="frames_in_memory needs .* GiB"):
        read(video_root, frames_in_memory=True)


def test_cameras_and_episodes_can_be_chosen(video_root):
    dataset = read(video_root, cameras=["wrist"], episodes=[2, 0])
    assert dataset.camera_keys == [CAMERAS[1]]
    assert dataset.episode_ids.tolist() == [2, 0]
    assert dataset.episode_bounds.tolist() == [[0, 12], [12, 19]]
    assert (dataset[13]["episode_index"], dataset[13]["frame_index"]) == (0, 1)
    assert decoded_number(dataset[13]["images"][CAMERAS[1]]) == (1, 1)
    assert decoded_number(dataset[0]["images"][CAMERAS[1]]) == (30, 1)
    assert read(video_root, cameras=[])[0]["images"] == {}


def test_chunks_stop_at_the_end_of_every_episode(video_root):
    dataset = read(video_root, action_horizon=9)
    chunks, is_pad = dataset.action_chunks(np.arange(len(dataset)))
    for start, stop in dataset.episode_bounds:
        for index in range(start, stop):
            steps = np.arange(index, index + 9)
            np.testing.assert_array_equal(chunks[index], dataset.actions[np.minimum(steps, stop - 1)])
            np.testing.assert_array_equal(is_pad[index], steps >= stop)


def test_indices_behave_like_those_of_a_list(video_root):
    dataset = read(video_root, cameras=[])
    assert dataset[-1]["dataset_index"] == len(dataset) - 1
    with pytest.raises(IndexError, match="outside the dataset, which has 42 samples"):
        dataset[42]


@pytest.mark.parametrize("use_videos", [True, False])
def test_data_loader_workers_read_the_same(tmp_path, episodes, use_videos):
    dataset = read(write(tmp_path / "dataset", episodes, use_videos=use_videos))
    dataset[20]  # the parent has its files open, in the middle, when the workers are forked
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", collate_fn=dict)
    for index, sample in enumerate(loader):
        assert sample["dataset_index"] == index
        for c, camera in enumerate(CAMERAS):
            assert decoded_number(sample["images"][camera]) == (index, c)
    assert decoded_number(dataset[21]["images"][CAMERAS[0]]) == (21, 0)


def test_a_spawned_process_reads_the_same(video_root):
    dataset = read(video_root)
    dataset[20]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        sample = pool.apply(dataset.__getitem__, (21,))
    np.testing.assert_equal(sample, dataset[21])


def test_a_dataset_survives_pickling(video_root):
    dataset = read(video_root)
    dataset[5]
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy[5]["images"][CAMERAS[0]], dataset[5]["images"][CAMERAS[0]])


# ---- what the writer leaves on disk ----------------------------------------------------------------------------


def test_written_files_are_lerobot_v3(video_root, episodes):
    info = json.loads((video_root / "meta" / "info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["robot_type"] == "test"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 42, 2)
    assert info["splits"] == {"train": "0:3"} and info["fps"] == FPS
    assert info["features"][CAMERAS[0]]["info"]["video.codec"] == "h264"
    assert info["features"]["index"]["dtype"] == "int64"

    data = pq.ParquetFile(video_root / "data" / "chunk-000" / "file-000.parquet")
    assert data.num_row_groups == 3
    assert str(data.schema_arrow.field("action").type) == "fixed_size_list<element: float>[3]"
    table = data.read()
    assert table["index"].to_pylist() == list(range(42))
    assert table["task_index"].to_pylist() == [0] * 7 + [1] * 23 + [0] * 12
    assert table["next.done"].to_pylist()[5:8] == [False, True, False]
    assert table["note"].to_pylist()[8] == "step 1"

    tasks = pq.read_table(video_root / "meta" / "tasks.parquet").to_pandas()
    assert tasks.index.name == "task" and tasks.iloc[1].name == "close the window"

    rows = pq.read_table(video_root / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()
    key = f"videos/{CAMERAS[0]}"
    assert [row["length"] for row in rows] == list(LENGTHS)
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [(0, 7), (7, 30), (30, 42)]
    assert rows[1][f"{key}/from_timestamp"] == 7 / FPS and rows[1][f"{key}/to_timestamp"] == 30 / FPS
    np.testing.assert_allclose(rows[1]["stats/action/q99"], np.quantile(episodes[1]["action"], 0.99, axis=0), 1e-6)
    assert rows[0]["tasks"] == ["open the drawer"]


def test_stats_are_global_quantiles(tmp_path, episodes):
    root = write(tmp_path / "dataset", episodes, use_videos=False, data_file_size_mb=0.001)
    stats = json.loads((root / "meta" / "stats.json").read_text())
    actions = np.concatenate([episode["action"] for episode in episodes]).astype(np.float64)
    for name, quantile in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
        np.testing.assert_allclose(stats["action"][name], np.quantile(actions, quantile, axis=0), rtol=1e-6)
    np.testing.assert_allclose(stats["action"]["std"], actions.std(0), rtol=1e-6)
    assert stats["action"]["count"] == [42]
    pixels = np.stack([coded_frame(number, 0) for number in range(42)]) / 255
    for name, quantile in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
        expected = np.quantile(pixels, quantile, axis=(0, 1, 2)).reshape(3, 1, 1)
        np.testing.assert_allclose(stats[CAMERAS[0]][name], expected, atol=1e-9)
    np.testing.assert_allclose(stats[CAMERAS[0]]["mean"], pixels.mean((0, 1, 2)).reshape(3, 1, 1))


def test_image_histogram_equals_numpy():
    frames = np.random.default_rng(0).integers(3, 200, (5, 33, 20, 3), dtype=np.uint8)
    histograms = [ImageHistogram(), ImageHistogram()]
    for number, frame in enumerate(frames):
        histograms[number % 2].add(frame)
    histograms[0].merge(histograms[1])
    found, values = histograms[0].statistics(), frames / 255
    assert found["count"] == [5]
    for name, function in (("min", np.min), ("max", np.max), ("mean", np.mean), ("std", np.std)):
        np.testing.assert_allclose(np.ravel(found[name]), function(values, axis=(0, 1, 2)))
    np.testing.assert_allclose(np.ravel(found["q01"]), np.quantile(values, 0.01, axis=(0, 1, 2)))
    np.testing.assert_allclose(np.ravel(found["q99"]), np.quantile(values, 0.99, axis=(0, 1, 2)))


def test_datasets_library_loads_the_data_files(tmp_path, episodes):
    datasets = pytest.importorskip("datasets")
    root = write(tmp_path / "dataset", episodes, use_videos=False)
    files = [str(path) for path in sorted(root.glob("data/*/*.parquet"))]
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["action"] == datasets.List(datasets.Value("float32"), length=3)
    np.testing.assert_array_equal(np.asarray(loaded[9][CAMERAS[0]]), coded_frame(9, 0))


def test_discarded_episodes_leave_no_trace(tmp_path, episodes):
    features = {"observation.state": FEATURES["observation.state"], "action": FEATURES["action"]}
    with LeRobotWriter(tmp_path / "d", fps=FPS, features=features | {CAMERAS[0]: FEATURES[CAMERAS[0]]}) as writer:
        for number, keep in ((0, True), (100, False), (200, True)):
            for step in range(4):
                writer.add_frame(
                    {
                        CAMERAS[0]: coded_frame(number + step, 0),
                        "observation.state": np.zeros(5),
                        "action": np.full(3, number + step),
                    }
                )
            if keep:
                writer.save_episode("wave")
            else:
                writer.discard_episode()
    dataset = read(tmp_path / "d")
    found = [decoded_number(dataset[i]["images"][CAMERAS[0]])[0] for i in range(len(dataset))]
    assert found == dataset.actions[:, 0].tolist() == [0, 1, 2, 3, 200, 201, 202, 203]


def test_frames_at_once_are_frames_one_by_one(tmp_path):
    features = {"action": {"dtype": "float32", "shape": (3,)}, "count": {"dtype": "uint8", "shape": (1,)}}
    rng = np.random.default_rng(0)
    columns = {"action": rng.normal(size=(9, 3)), "count": rng.integers(0, 256, size=(9, 1))}
    rows = [{name: values[step] for name, values in columns.items()} for step in range(9)]
    with LeRobotWriter(tmp_path / "one", fps=10, features=features) as one:
        with LeRobotWriter(tmp_path / "all", fps=10, features=features) as together:
            for row in rows:
                one.add_frame(row)
            together.add_frames({name: values[:4] for name, values in columns.items()})
            together.add_frame(rows[4])
            together.add_frames({name: values[5:] for name, values in columns.items()})
            for change, message in (
                ({"action": columns["action"][:3]}, r"lengths {'action': \(3,\), 'count': \(9,\)}"),
                ({"more": columns["count"]}, "for the features action, count"),
                ({"action": columns["action"][:, :2]}, r"action has shape \(9, 2\); it must be \(frames, 3\)"),
                (
                    {"action": np.where(np.eye(9, 3, -4), np.nan, 1.0)},
                    r"action, frame 13: got \[nan, 1.0, 1.0\]; all values",
                ),
                ({"count": np.full((9, 1), 0.5)}, "does not fit the feature's uint8"),
            ):
                with pytest.raises(ValueError, match=message):
                    together.add_frames(columns | change)
            one.save_episode("wave")
            together.save_episode("wave")
    paths = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(paths) == 5
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "all" / path).read_bytes() for path in paths)
    with small_writer(tmp_path / "strings") as writer:
        with pytest.raises(ValueError, match="no cameras or strings: use add_frame"):
            writer.add_frames({name: np.zeros((2, 1)) for name in SMALL_FEATURES})
        writer.add_frame(GOOD_FRAME)
        writer.save_episode("wave")


SMALL_FEATURES = {
    "observation.state": {"dtype": "float32", "shape": (2,)},
    "action": {"dtype": "float32", "shape": (2,)},
    "count": {"dtype": "uint8", "shape": (1,)},
    "done": {"dtype": "bool", "shape": (1,)},
    "note": {"dtype": "string", "shape": (1,)},
}
GOOD_FRAME = {"observation.state": np.zeros(2), "action": [1, 2], "count": 255, "done": False, "note": "good"}


def small_writer(root: Path) -> LeRobotWriter:
    return LeRobotWriter(root, fps=10, features=SMALL_FEATURES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": np.array([0.0, np.nan])}, r"action, frame 1: got \[0.0, nan\]; all values must be finite"),
        ({"observation.state": np.array([np.inf, 0.0])}, "observation.state, frame 1: got .*finite"),
        ({"action": np.zeros(3)}, r"action, frame 1: got shape \(3,\); the feature has shape \(2,\)"),
        ({"action": np.array([1 + 2j, 0])}, "action, frame 1: got complex128"),
        ({"count": 300}, "count, frame 1: got int64 .300., which does not fit the feature's uint8"),
        ({"count": 1.0}, "count, frame 1: got float64"),
        ({"done": 1}, "done, frame 1: got int64"),
        ({"note": 3}, "note, frame 1: got 3; the feature is a string"),
        ({"extra": 1}, r"Frame 1: missing features \[\], unknown features \['extra'\]"),
    ],
)
def test_writer_refuses_bad_values(tmp_path, change, message):
    writer = small_writer(tmp_path / "d")
    writer.add_frame(GOOD_FRAME)
    with pytest.raises(ValueError, match=message):
        writer.add_frame(GOOD_FRAME | change)
    writer.add_frame(GOOD_FRAME)  # the refused frame left the episode as it was
    writer.save_episode("wave")
    writer.finalize()
    assert len(read(tmp_path / "d")) == 2


@pytest.mark.parametrize("pixels", [np.zeros((SIZE, SIZE, 3)), np.zeros((3, SIZE, SIZE), np.uint8)])
def test_writer_refuses_bad_images(tmp_path, pixels):
    with LeRobotWriter(tmp_path / "d", fps=10, features={CAMERAS[0]: FEATURES[CAMERAS[0]]}) as writer:
        with pytest.raises(ValueError, match=f"{CAMERAS[0]}, frame 0: got .*images are uint8"):
            writer.add_frame({CAMERAS[0]: pixels})
        writer.add_frame({CAMERAS[0]: coded_frame(0, 0)})
        writer.save_episode("wave")


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"dtype": "video", "shape": (63, 64, 3)}, "even sizes"),
        ({"dtype": "video", "shape": (3, 64, 64)}, r"must be \(height, width, 3\)"),
        ({"dtype": "float33", "shape": (2,)}, "has dtype 'float33'; supported are"),
        ({"dtype": "float32", "shape": (2, 2)}, r"stores vectors \(n,\)"),
        ({"dtype": "float32"}, "lacks shape"),
    ],
)
def test_writer_refuses_bad_features(tmp_path, feature, message):
    with pytest.raises(ValueError, match=message):
        LeRobotWriter(tmp_path / "d", fps=10, features={"x": feature})
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_an_existing_folder(tmp_path, video_root):
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        small_writer(video_root)
    (tmp_path / "empty").mkdir()
    with small_writer(tmp_path / "empty") as writer:
        writer.add_frame(GOOD_FRAME)
        writer.save_episode("wave")
    assert len(read(tmp_path / "empty")) == 1


def test_nothing_is_left_after_an_error(tmp_path, episodes):
    with pytest.raises(ZeroDivisionError), LeRobotWriter(tmp_path / "d", fps=FPS, features=FEATURES) as writer:
        for camera_frame in range(2):
            writer.add_frame(
                {camera: coded_frame(camera_frame, 0) for camera in CAMERAS}
                | {"observation.state": np.zeros(5), "action": np.zeros(3), "next.done": False, "note": ""}
            )
            writer.save_episode("wave")
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_writer_demands_a_complete_recording(tmp_path):
    with pytest.raises(ValueError, match="No episode was saved"), small_writer(tmp_path / "a"):
        pass
    with pytest.raises(ValueError, match="1 frames were added after the last save_episode"):
        with small_writer(tmp_path / "b") as writer:
            writer.add_frame(GOOD_FRAME)
    with pytest.raises(ValueError, match="has no frames"), small_writer(tmp_path / "c") as writer:
        writer.save_episode("wave")
    with pytest.raises(ValueError, match="the task is ' '"), small_writer(tmp_path / "d") as writer:
        writer.add_frame(GOOD_FRAME)
        writer.save_episode(" ")
    assert list(tmp_path.iterdir()) == []


# ---- files that LeRobot wrote ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cameras", "episodes", "bound"),
    [
        ("lerobot_real_v3", ["front"], [0, 7], 29),
        ("lerobot_real_v3_h264", ["wrist"], None, 28),
        ("lerobot_real_v3_images", None, [0], 90),
    ],
    ids=["av1", "h264", "images"],
)
def test_real_frames_are_the_recorded_ones(name, cameras, episodes, bound):
    dataset = read(FIXTURES / name, cameras=cameras, episodes=episodes)
    raw = np.load(FIXTURES / f"{name}_rawframes.npz")
    ids = dataset.episode_ids.tolist()
    for row, (episode, frame) in enumerate(zip(raw["ep"].tolist(), raw["fi"].tolist(), strict=True)):
        start, stop = dataset.episode_bounds[ids.index(episode)]
        sample = dataset[start + frame]
        assert (sample["episode_index"], sample["frame_index"]) == (episode, frame)
        np.testing.assert_array_equal(sample["state"], raw["state"][row])
        np.testing.assert_array_equal(sample["actions"][0], raw["action"][row])
        for camera in dataset.camera_keys:
            original = raw[camera.removeprefix("observation.images.")][row]
            assert psnr(sample["images"][camera], original) > bound
            neighbours = [i for i in (start + frame - 1, start + frame + 1) if start <= i < stop]
            for index in neighbours:
                assert psnr(dataset.image(index, camera), original) < psnr(sample["images"][camera], original)


def test_real_per_camera_sharding():
    dataset = read(FIXTURES / "lerobot_real_v3", episodes=[19])  # front file 2, wrist file 1, not at their starts
    assert dataset.fps == 80 and len(dataset.camera_keys) == 2
    last = dataset[len(dataset) - 1]
    assert all(pixels.shape == (128, 128, 3) for pixels in last["images"].values())
    assert last["action_is_pad"].tolist() == [False, True, True, True]
    assert last["instruction"] in dataset.tasks.values()


def test_real_converted_dataset():
    dataset = read(FIXTURES / "lerobot_conv_v30", cameras=[])
    assert (len(dataset), dataset.num_episodes, len(dataset.tasks)) == (670, 10, 3)
    np.testing.assert_array_equal(dataset[0]["state"], read(FIXTURES / "lerobot_real_v3", cameras=[])[0]["state"])


@pytest.mark.parametrize("version", ["v2.1", "v2.0"])
def test_real_old_format(tmp_path, version):
    root = Path(shutil.copytree(FIXTURES / "lerobot_real_v21", tmp_path / "old"))
    change_info(root, codebase_version=version)
    dataset = read(root, episodes=[3, 0])
    newer = read(FIXTURES / "lerobot_conv_v30", cameras=[], episodes=[3, 0])  # the same recording, converted
    np.testing.assert_array_equal(dataset.states, newer.states)
    np.testing.assert_array_equal(dataset.actions, newer.actions)
    assert dataset.episode_bounds.tolist() == newer.episode_bounds.tolist() == [[0, 39], [39, 90]]
    assert dataset.tasks == newer.tasks and dataset[40]["frame_index"] == 1
    raw = np.load(FIXTURES / "lerobot_real_v3_rawframes.npz")  # the same demonstrations again
    for row in range(3):  # frames of episode 0
        pixels = dataset.image(39 + int(raw["fi"][row]), "observation.images.front")
        assert psnr(pixels, raw["front"][row]) > 29
    with pytest.raises(FileNotFoundError, match="episode_000001.mp4 is missing: the video of .*episode 1"):
        read(root)
    (root / "meta" / "episodes.jsonl").write_text('{"episode_index"')
    with pytest.raises(ValueError, match="episodes.jsonl is not valid JSON lines"):
        read(root)


def test_a_partial_download_is_named():
    with pytest.raises(FileNotFoundError, match=r"file-001.mp4 is missing: the video of .*front, episode 10"):
        read(FIXTURES / "lerobot_real_v3", cameras=["front"])


def test_old_name_of_the_task_column(damaged):
    path = damaged / "meta" / "tasks.parquet"
    table = pq.read_table(path).rename_columns(["task_index", "__index_level_0__"])
    pq.write_table(table.replace_schema_metadata(None), path)
    assert read(damaged, cameras=[])[8]["instruction"] == "close the window"


# ---- damaged datasets ------------------------------------------------------------------------------------------


def test_missing_folders_and_metadata(tmp_path, damaged):
    with pytest.raises(FileNotFoundError, match="Dataset folder .* does not exist"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"info.json is missing, so .* is not a LeRobot dataset"):
        read(tmp_path / "empty")
    shutil.rmtree(damaged / "meta" / "episodes")
    with pytest.raises(FileNotFoundError, match="episodes has no parquet file"):
        read(damaged)
    (damaged / "meta" / "tasks.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="tasks.parquet is missing"):
        read(damaged)


def change_info(root: Path, **changes):
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"total_episodes": 4},
            "says 4 episodes and 42 frames, but the list of episodes in meta/ has 3 episodes and 42 frames",
        ),
        ({"total_frames": 43}, "says 3 episodes and 43 frames"),
        ({"codebase_version": "v1.6"}, "is in LeRobot format v1.6; this reader supports"),
        ({"fps": None}, "lacks fps"),
        ({"fps": 0}, "has fps 0; it must be positive"),
        ({"fps": 19}, "episode 1 has 23 rows, but its .* video spans 1.1500 s, which is 21.85 frames at 19 fps"),
        ({"video_path": None}, "has no video_path, but declares videos"),
    ],
)
def test_info_that_disagrees(damaged, changes, message):
    change_info(damaged, **changes)
    with pytest.raises(ValueError, match=message):
        read(damaged)


def test_broken_json(damaged):
    (damaged / "meta" / "info.json").write_text('{"fps": 20,')
    with pytest.raises(ValueError, match="info.json is not valid JSON"):
        read(damaged)


@pytest.mark.parametrize("name", ["data/chunk-000/file-000.parquet", "meta/tasks.parquet"])
def test_truncated_parquet(damaged, name):
    path = damaged / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{path.name} \(.* bytes\) cannot be read as parquet"):
        read(damaged)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_corrupt_video(damaged, content):
    path = next((damaged / "videos" / CAMERAS[0]).rglob("*.mp4"))
    path.write_bytes(path.read_bytes()[:600] if content is None else content)
    dataset = read(damaged)
    with pytest.raises(ValueError, match=rf"Camera {CAMERAS[0]}, episode 1, frame 5: .*{path.name}"):
        dataset[12]


def test_truncated_video_reads_up_to_the_damage(damaged):
    path = next((damaged / "videos" / CAMERAS[0]).rglob("*.mp4"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    dataset = read(damaged)
    assert decoded_number(dataset[3]["images"][CAMERAS[0]]) == (3, 0)
    with pytest.raises(ValueError, match=rf"Camera {CAMERAS[0]}, episode 2, frame 11: .*{path.name}"):
        dataset[41]
    assert decoded_number(dataset[4]["images"][CAMERAS[0]]) == (4, 0)


def rewrite_data(root: Path, change):
    path = root / "data" / "chunk-000" / "file-000.parquet"
    frame = pq.read_table(path).to_pandas()
    change(frame).to_parquet(path)


def test_data_that_disagrees_with_the_episodes(damaged):
    rewrite_data(damaged, lambda frame: frame[frame["index"] != 20])
    with pytest.raises(ValueError, match="has 22 rows of episode 1; meta/episodes says 23"):
        read(damaged)
    assert len(read(damaged, episodes=[0, 2])) == 19


def test_nan_in_the_state(damaged):
    def poison(frame):
        frame.at[9, "observation.state"] = np.array([0, 0, np.nan, 0, 0], np.float32)
        return frame

    rewrite_data(damaged, poison)  # pandas also turns the fixed-size lists into plain ones
    with pytest.raises(ValueError, match="observation.state of episode 1, frame 2 is NaN or infinite"):
        read(damaged)
    assert len(read(damaged, episodes=[0, 2])) == 19


def test_broken_image(tmp_path, episodes):
    root = write(tmp_path / "dataset", episodes, use_videos=False)

    def spoil(frame):
        frame.at[8, CAMERAS[1]] = {"bytes": frame.at[8, CAMERAS[1]]["bytes"][:200], "path": None}
        frame.at[9, CAMERAS[1]] = {"bytes": None, "path": None}
        return frame

    rewrite_data(root, spoil)
    dataset = read(root)
    with pytest.raises(ValueError, match=f"Camera {CAMERAS[1]}, episode 1, frame 1: the image cannot be decoded"):
        dataset[8]
    with pytest.raises(ValueError, match=f"Camera {CAMERAS[1]}, episode 1, frame 2: the image is empty"):
        dataset[9]
    np.testing.assert_array_equal(dataset[10]["images"][CAMERAS[1]], coded_frame(10, 1))


def test_unknown_task_index(damaged):
    rewrite_data(damaged, lambda frame: frame.assign(task_index=frame["task_index"] + 1))
    with pytest.raises(ValueError, match=r"use task_index \[2\], but the list of tasks in meta/ only has \[0, 1\]"):
        read(damaged)


def test_unknown_names_list_the_known_ones(video_root):
    with pytest.raises(ValueError, match=f"Camera 'side' is not in .*: {CAMERAS[0]}, {CAMERAS[1]}"):
        read(video_root, cameras=["side"])
    with pytest.raises(ValueError, match="state_key 'qpos' is not a feature of .*observation.state"):
        read(video_root, state_key="qpos")
    with pytest.raises(ValueError, match=r"Episodes \[3\] are not in .*which has 3 episodes \(0 to 2\)"):
        read(video_root, episodes=[0, 3])
    with pytest.raises(ValueError, match="action_horizon is 0"):
        read(video_root, action_horizon=0)


# ---- statistics ------------------------------------------------------------------------------------------------


def reference_statistics(values: np.ndarray) -> dict:
    return {
        "q01": np.quantile(values, 0.01, axis=0), "q99": np.quantile(values, 0.99, axis=0),
        "mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0),
    }  # fmt: skip


def assert_statistics(found: dict, values: np.ndarray):
    expected = reference_statistics(values.astype(np.float64))
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        assert isinstance(found[name], list)
        np.testing.assert_allclose(found[name], numbers, rtol=1e-5, atol=1e-6)


def test_statistics_of_a_native_embodiment(video_root, episodes):
    embodiment = Embodiment(
        cameras={CAMERAS[0]: "front view"}, control_frequency=FPS, action_horizon=4,
        state_layout=[["native", 5]], action_layout=[["native", 3]],
    )  # fmt: skip
    found = compute_statistics(read(video_root), embodiment, progress=False)
    assert_statistics(found["state"], np.concatenate([e["observation.state"] for e in episodes]))
    assert_statistics(found["action"], np.concatenate([e["action"] for e in episodes]))
    embodiment = Embodiment.from_dict(embodiment.to_dict() | {"statistics": found})
    normalised = embodiment.encode_actions(episodes[0]["action"], None)
    assert np.abs(normalised).max() <= 1


def arm_dataset(root: Path, lengths=(9, 6)) -> Path:
    """A robot with absolute end-effector targets: position, axis-angle, gripper."""
    rng = np.random.default_rng(3)
    features = {name: {"dtype": "float32", "shape": (7,)} for name in ("observation.state", "action")}
    with LeRobotWriter(root, fps=10, features=features) as writer:
        for length in lengths:
            for _ in range(length):
                writer.add_frame({"observation.state": rng.normal(size=7), "action": rng.normal(size=7)})
            writer.save_episode("wave")
    return root


@pytest.mark.parametrize("reference_frame", ["absolute", "world_relative", "eef_delta"])
def test_statistics_after_the_transform(tmp_path, reference_frame):
    layout = [["left_ee_position", 3], ["left_ee_rotation", 3], ["left_gripper", 1]]
    embodiment = Embodiment(
        cameras={"front": "front"}, control_frequency=10, action_horizon=4, state_layout=layout,
        action_layout=layout, reference_frame=reference_frame,
    )  # fmt: skip
    dataset = read(arm_dataset(tmp_path / "arm"))
    found = compute_statistics(dataset, embodiment, progress=False)
    assert_statistics(found["state"], embodiment.transform_state(dataset.states))
    values = []
    for index in range(len(dataset)):
        sample = dataset[index]
        steps = 1 if reference_frame == "absolute" else 4
        chunk = embodiment.transform_actions(sample["actions"][:steps], sample["state"])
        values.append(chunk[~sample["action_is_pad"][:steps]])
    assert_statistics(found["action"], np.concatenate(values))
    both = compute_statistics([dataset, dataset], embodiment, progress=False)
    np.testing.assert_allclose(both["action"]["mean"], found["action"]["mean"], rtol=1e-6, atol=1e-7)


def test_statistics_refuse_what_does_not_fit(tmp_path, video_root):
    layout = [["left_ee_position", 3], ["left_ee_rotation", 3], ["left_gripper", 1]]
    embodiment = Embodiment(
        cameras={"front": "front"}, control_frequency=10, action_horizon=5, state_layout=layout,
        action_layout=layout, reference_frame="world_relative",
    )  # fmt: skip
    with pytest.raises(ValueError, match="has 5 state numbers per frame; the embodiment's state_layout has 7"):
        compute_statistics(read(video_root), embodiment)
    with pytest.raises(ValueError, match="read with action_horizon 4; the embodiment has 5"):
        compute_statistics(read(arm_dataset(tmp_path / "arm")), embodiment)


# ---- multimodal samples ----------------------------------------------------------------------------------------


def write_multimodal(path: Path, count: int) -> Path:
    with MultimodalWriter(path) as writer:
        for number in range(count):
            metadata = {"object": f"cup {number}", "box": [number, 0.5, 2.0, 3.0], "task": None}
            writer.add(coded_frame(number, 1), f"Where is cup {number}?", f"<box>[{number}]</box>", metadata)
    return path


@pytest.mark.parametrize("in_memory", [True, False])
def test_multimodal_round_trip(tmp_path, in_memory):
    path = write_multimodal(tmp_path / "vqa.parquet", 600)  # several row groups
    assert [p.name for p in tmp_path.iterdir()] == ["vqa.parquet"]
    dataset = MultimodalDataset(path, in_memory=in_memory)
    assert len(dataset) == 600
    for index in (0, 255, 256, 599, 3, -1):
        sample = dataset[index]
        number = index % 600
        np.testing.assert_array_equal(sample["images"][0], coded_frame(number, 1))
        assert sample["text"] == f"Where is cup {number}?" and sample["answer"] == f"<box>[{number}]</box>"
        assert sample["metadata"] == {"object": f"cup {number}", "box": [number, 0.5, 2.0, 3.0], "task": None}
        assert sample["dataset_index"] == number
    assert len(pickle.loads(pickle.dumps(dataset))) == 600
    with pytest.raises(IndexError, match="which has 600 samples"):
        dataset[600]


def test_multimodal_folder_of_files(tmp_path):
    write_multimodal(tmp_path / "b.parquet", 3)
    write_multimodal(tmp_path / "a.parquet", 2)
    texts = [sample["text"][-2:] for sample in (MultimodalDataset(tmp_path)[i] for i in range(5))]
    assert texts == ["0?", "1?", "0?", "1?", "2?"]


def test_datasets_library_loads_multimodal_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = write_multimodal(tmp_path / "vqa.parquet", 4)
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["image"] == datasets.Image()
    np.testing.assert_array_equal(np.asarray(loaded[2]["image"]), coded_frame(2, 1))


def test_multimodal_errors(tmp_path):
    path = write_multimodal(tmp_path / "vqa.parquet", 3)
    with pytest.raises(FileExistsError, match="vqa.parquet exists"):
        MultimodalWriter(path)
    with pytest.raises(FileNotFoundError, match="is not a parquet file or a folder"):
        MultimodalDataset(tmp_path / "nothing.parquet")
    with pytest.raises(ValueError, match=r"Sample 1 of .* has metadata \['box'\]"):
        with MultimodalWriter(tmp_path / "other.parquet") as writer:
            writer.add(coded_frame(0, 0), "a", "b", {"object": "cup"})
            writer.add(coded_frame(0, 0), "a", "b", {"box": [1]})
    with pytest.raises(ValueError, match="answer is ''"), MultimodalWriter(tmp_path / "other.parquet") as writer:
        writer.add(coded_frame(0, 0), "a", "")
    with pytest.raises(ValueError, match="the image is float64"), MultimodalWriter(tmp_path / "o.parquet") as writer:
        writer.add(np.zeros((4, 4, 3)), "a", "b")
    assert [p.name for p in tmp_path.iterdir()] == ["vqa.parquet"]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        MultimodalDataset(path)


# ---- mixture ---------------------------------------------------------------------------------------------------


def numbered(count: int, kind: str) -> list[dict]:
    if kind == "action":
        return [{"instruction": "wave", "embodiment": "robot", "number": n, "images": {}} for n in range(count)]
    return [{"text": "where?", "number": n, "images": []} for n in range(count)]


def draws(mixture: CoTrainingMixture) -> list[tuple[str, int]]:
    return [
        ("action" if "instruction" in s else "multimodal", s["number"])
        for s in (mixture[i] for i in range(len(mixture)))
    ]


@pytest.mark.parametrize(("fraction", "share", "block"), [(0.1, 1, 10), (0.25, 1, 4), (0.3, 3, 10), (1 / 3, 1, 3)])
def test_mixture_has_the_exact_proportion_in_every_block(fraction, share, block):
    mixture = CoTrainingMixture(
        numbered(13, "action"), numbered(7, "multimodal"), multimodal_fraction=fraction, length=300, seed=4
    )
    kinds = [kind for kind, _ in draws(mixture)]
    places = set()
    for start in range(0, 300, block):
        assert kinds[start : start + block].count("multimodal") == share
        places.add(kinds[start : start + block].index("multimodal"))
    assert len(places) > 1  # not always the same place: ranks that take turns all get some


def test_mixture_covers_every_sample_once_per_pass():
    mixture = CoTrainingMixture(
        numbered(13, "action"), numbered(7, "multimodal"), multimodal_fraction=0.25, length=400, seed=4
    )
    found = draws(mixture)
    assert found == [(kind, index) for kind, index in (mixture.locate(i) for i in range(400))]
    for kind, count in (("action", 13), ("multimodal", 7)):
        numbers = [number for k, number in found if k == kind]
        passes = [numbers[start : start + count] for start in range(0, len(numbers) - count + 1, count)]
        assert all(sorted(each) == list(range(count)) for each in passes)
        assert len({tuple(each) for each in passes}) > 1  # another order in every pass


def test_mixture_is_a_function_of_seed_and_index():
    def make(seed):
        return CoTrainingMixture(numbered(50, "action"), numbered(9, "multimodal"), seed=seed, length=200)

    expected = draws(make(1))
    assert draws(make(1)) == expected != draws(make(2))
    resumed, backwards = make(1), make(1)
    assert [resumed.locate(i) for i in range(150, 200)] == expected[150:]
    assert [backwards.locate(i) for i in reversed(range(200))] == expected[::-1]
    assert draws(pickle.loads(pickle.dumps(make(1)))) == expected


@pytest.mark.parametrize("multimodal", [None, 9])
def test_default_length_is_one_pass_over_the_actions(multimodal):
    other = None if multimodal is None else numbered(multimodal, "multimodal")
    for count in range(30, 45):
        mixture = CoTrainingMixture(numbered(count, "action"), other, multimodal_fraction=0.25)
        found = draws(mixture)
        assert sorted(number for kind, number in found if kind == "action") == list(range(count))
        assert found[-1][0] == "action" or count % 3 == 0
    with pytest.raises(IndexError, match="outside the mixture"):
        mixture[len(mixture)]


def test_workers_and_augmentation_do_not_change_the_draws(video_root, tmp_path):
    multimodal = MultimodalDataset(write_multimodal(tmp_path / "vqa.parquet", 5))
    mixture = CoTrainingMixture(
        read(video_root), multimodal, multimodal_fraction=0.2, seed=7, length=40,
        augment=compose(random_shift(3), drop_state(0.5)),
    )  # fmt: skip
    expected = [mixture[i] for i in range(40)]
    for workers in (1, 2):
        loader = DataLoader(mixture, batch_size=None, num_workers=workers, collate_fn=dict)
        for found, sample in zip(loader, expected, strict=True):
            np.testing.assert_equal(found, sample)
    hidden = [sample["state_is_dropped"] for sample in expected if "instruction" in sample]
    assert 0 < sum(hidden) < len(hidden) == 32


def test_mixture_errors():
    with pytest.raises(ValueError, match="multimodal_fraction is 1"):
        CoTrainingMixture(numbered(3, "action"), numbered(3, "multimodal"), multimodal_fraction=1)
    with pytest.raises(ValueError, match="no p/q with q up to 1000"):
        CoTrainingMixture(numbered(3, "action"), numbered(3, "multimodal"), multimodal_fraction=0.123456)
    with pytest.raises(ValueError, match="multimodal dataset is empty"):
        CoTrainingMixture(numbered(3, "action"), [])
    with pytest.raises(ValueError, match="seed is -1"):
        CoTrainingMixture(numbered(3, "action"), seed=-1)
    with pytest.raises(ValueError, match="length is 0"):
        CoTrainingMixture(numbered(3, "action"), length=0)


# ---- augmentations ---------------------------------------------------------------------------------------------


def test_random_shift_moves_and_repeats_the_edge():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    original = pixels.copy()
    sample = {"instruction": "wave", "embodiment": "robot", "images": {"a": pixels, "b": pixels}}
    padded = np.pad(pixels, ((2, 2), (2, 2), (0, 0)), mode="edge")
    windows = [padded[y : y + 9, x : x + 12] for y in range(5) for x in range(5)]
    seen = {"a": set(), "b": set()}
    together = 0
    for seed in range(200):
        shifted = random_shift(2)(sample, np.random.default_rng(seed))
        found = {}
        for camera, image in shifted["images"].items():
            found[camera] = next(n for n, window in enumerate(windows) if np.array_equal(window, image))
            seen[camera].add(found[camera])
        together += found["a"] == found["b"]
    assert len(seen["a"]) == len(seen["b"]) == 25 and together < 30
    np.testing.assert_array_equal(pixels, original)
    np.testing.assert_array_equal(random_shift(0)(sample, np.random.default_rng(0))["images"]["a"], pixels)


def test_augmentations_leave_multimodal_samples_alone():
    sample = {"text": "where?", "answer": "<box>[1]</box>", "images": [coded_frame(1, 0)]}
    assert compose(random_shift(4), drop_state(1.0))(sample, np.random.default_rng(0)) is sample


def test_drop_state_keeps_the_state():
    sample = {"instruction": "wave", "embodiment": "robot", "state": np.ones(3), "images": {}}
    dropped = drop_state(1.0)(sample, np.random.default_rng(0))
    assert dropped["state_is_dropped"] is True and dropped["state"].all() and "state_is_dropped" not in sample
    assert drop_state(0.0)(sample, np.random.default_rng(0))["state_is_dropped"] is False
    with pytest.raises(ValueError, match="probability is 2"):
        drop_state(2)


# ---- collator --------------------------------------------------------------------------------------------------


class PickyProcessor:
    """Accepts samples whose number is not 13, and batches with one kind of sample."""

    def encode(self, samples):
        for sample in samples:
            if sample["number"] == 13:
                raise ValueError("13 is not a number")
        if len({"text" in sample for sample in samples}) > 1:
            raise ValueError("kinds differ")
        return [sample["number"] for sample in samples]


def test_collator_names_the_sample_that_fails():
    collate = Collator(PickyProcessor())
    assert collate(numbered(3, "action")) == [0, 1, 2]
    samples = [
        {**sample, "episode_index": 4, "dataset_index": 20 + sample["number"]} for sample in numbered(14, "action")
    ]
    message = r"Sample 13 of the batch \(action, embodiment robot, dataset_index 33, episode_index 4\): 13 is not"
    with pytest.raises(ValueError, match=message):
        collate(samples)
    with pytest.raises(ValueError, match=r"Batch of 2 samples \(action, embodiment robot; multimodal\): kinds differ"):
        collate(numbered(1, "action") + numbered(1, "multimodal"))


def test_from_disk_to_a_batch_and_back(video_root, tmp_path):
    layouts = {"state_layout": [["native", 5]], "action_layout": [["native", 3]]}
    robot = {
        "cameras": dict.fromkeys(CAMERAS, "view"),
        "control_frequency": FPS,
        "action_horizon": 4,
        **layouts,
    }
    dataset = read(video_root, frames_in_memory=True)
    statistics = compute_statistics(dataset, Embodiment.from_dict(robot), progress=False)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(["Where is the cup? user assistant"], vocab_size=300)
    names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    processor = WallVLAProcessor(
        Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=64, max_pixels=64 * 64),
        tokenizer, {"robot": Embodiment.from_dict(robot | {"statistics": statistics})}, action_dim=6, action_horizon=5,
    )  # fmt: skip
    questions = MultimodalDataset(write_multimodal(tmp_path / "vqa.parquet", 5))
    mixture = CoTrainingMixture(dataset, questions, multimodal_fraction=0.25, augment=random_shift(2), length=40)
    for batch, first in zip(
        DataLoader(mixture, batch_size=8, collate_fn=Collator(processor)), range(0, 40, 8), strict=True
    ):
        assert batch["actions"].shape == batch["action_mask"].shape == (8, 5, 6)
        for row in range(8):
            source, index = mixture.locate(first + row)
            assert batch["action_mask"][row].any() == (source == "action")
            assert (batch["labels"][row] != -100).any() == (source == "multimodal")
            if source == "multimodal":
                continue
            chunk, is_pad = (values[0] for values in dataset.action_chunks(np.array([index])))
            found = processor.decode_actions(batch["actions"][row].numpy(), embodiment="robot")
            clipped = np.clip(chunk, statistics["action"]["q01"], statistics["action"]["q99"])
            np.testing.assert_allclose(found[~is_pad], clipped[~is_pad], atol=1e-5)
            assert batch["action_mask"][row].sum() == 3 * (~is_pad).sum()
