"""Writes the pictures and the observation that the Space shows: python examples/make_space_examples.py FOLDER"""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from wallvla.evaluation.metaworld import ACTION_NAMES, EVALUATION_SEED_START, MetaWorldEnv


SCENES = {"button": "button-press-topdown-v3", "drawer": "drawer-open-v3", "window": "window-close-v3"}
IMAGE_SIZE = 64  # what the quickstart's model was trained with
METRES_PER_ACTION = 0.01
HORIZON = 8


def main(folder: Path) -> None:
    """Renders unseen scenes; the observation is from the middle of the expert's way to the button."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in SCENES.items():
        with MetaWorldEnv(task, ("front",), IMAGE_SIZE) as env:
            env.reset(EVALUATION_SEED_START + 500)
            for _ in range(20):
                env.step(env.expert_action())
            image = env.observe()["images"]["front"]
            Image.fromarray(image).save(folder / f"{name}.png")
            if name == "button":
                observation = record(env, image)
    (folder / "observation.json").write_text(json.dumps(observation, indent=1) + "\n")


def record(env: MetaWorldEnv, image: np.ndarray) -> dict:
    """The observation of this instant and what the expert does next, as spaces/grounding/README.md describes it."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    state = env.state
    projection = camera_matrix(env, "front")
    actions = []
    for _ in range(HORIZON):
        actions.append(env.expert_action())
        env.step(actions[-1])
    return {
        "embodiment": "metaworld_sawyer",
        "instruction": env.instruction,
        "state": state.round(5).tolist(),
        "images": {"front": base64.b64encode(buffer.getvalue()).decode()},
        "action_names": list(ACTION_NAMES),
        "path": {"channels": [0, 1, 2], "start": state[:3].round(5).tolist(), "scale": METRES_PER_ACTION},
        "camera": {"image": "front", "projection": projection.tolist()},
        "demonstrated": np.round(actions, 4).tolist(),
    }


def camera_matrix(env: MetaWorldEnv, camera: str) -> np.ndarray:
    """The projection (3, 4) of a camera, from six points that the simulator projects: each gives two equations."""
    points = np.random.default_rng(0).uniform([-0.4, 0.4, 0.0], [0.4, 0.9, 0.4], (12, 3))
    pixels = env.project(camera, points)
    rows = []
    for point, (x, y) in zip(np.hstack([points, np.ones((12, 1))]), pixels, strict=True):
        rows += [[*point, *np.zeros(4), *(-x * point)], [*np.zeros(4), *point, *(-y * point)]]
    matrix = np.linalg.svd(np.array(rows))[2][-1].reshape(3, 4)
    matrix /= np.linalg.norm(matrix[2, :3])
    found = np.hstack([points, np.ones((12, 1))]) @ matrix.T
    assert np.abs(found[:, :2] / found[:, 2:] - pixels).max() < 1e-6
    return matrix


if __name__ == "__main__":
    main(Path(sys.argv[1]))
