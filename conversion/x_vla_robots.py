"""X-VLA's domains as robots, and the processor of a checkpoint.

The numbers are those of its public code (`datasets/domain_config.py`, `datasets/domain_handler/`, the clients in
`evaluation/`) and of table 10 of the paper.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import BartTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..action_space_wallvla import Embodiment
from ..configuration_wallvla import WallVLAConfig
from ..images_wallvla import florence2_image_processor
from ..processing_wallvla import WallVLAProcessor
from ..prompts_wallvla import X_VLA
from ..vl_experts_wallvla import Florence2
from .published import Checkpoint, locate
from .tensor_files import read_json
from .x_vla import action_mode, mode_of, x_vla_config


@dataclass(frozen=True)
class Robot:
    """One domain of the published data.

    domain: its name, among those of `DOMAINS`.
    seconds: what the anchors of a chunk cover.
    views: labels of the cameras, the main view first.
    arms: 1 or 2; the first is "left".
    tag: what the language prompts of table 10 call it.
    rot6d: which six numbers of a rotation its data has; see `Embodiment.model_rot6d`.
    is_relative: the data has positions relative to the state, beside absolute rotations.
    """

    domain: str
    seconds: float
    views: tuple[str, ...]
    arms: int = 1
    tag: str = ""
    rot6d: str = "interleaved"
    is_relative: bool = False


# By `domain_ids`. The places between and after them were never trained
DOMAINS = (
    *("Bridge", "RT1", "Calvin", "libero", "widowx-air", "AIR-AGILEX-HQ", "robotwin2", "robocasa-human", "VLABench"),
    *("AGIBOT-challenge", "AIR-AGILEX", "robomind-franka", "robomind-ur", "Droid-Left", "Droid-Right", "AGIBOT"),
    *("robomind-agilex", "robomind-franka-dual", "AIRBOT", "domain_19", "agiworld-pack", "agiworld-conveyor"),
    *("agiworld-restock", "agiworld-pour", "agiworld-microwave", "agiworld-cloth", "agiworld-conveyor-extra"),
    *("agiworld-cloth-2", "domain_28", "domain_29"),
)
# "Wrist View" of a robot with two arms in table 10: one for each
WRISTS = ("left wrist view", "right wrist view")
ROBOTS = (
    Robot("Bridge", 5, ("front view",), tag="WidowX"),
    Robot("RT1", 10, ("front view",), tag="Google Robot", is_relative=True),
    Robot("Calvin", 1, ("front view", "wrist view"), tag="Single Franka"),
    Robot("libero", 1, ("front view", "wrist view"), tag="Single Franka", rot6d="columns"),
    Robot("AIR-AGILEX-HQ", 2, ("front view", *WRISTS), 2, "AgileX"),
    Robot("robotwin2", 1, ("head view", *WRISTS), 2, "AgileX"),
    Robot("VLABench", 1, ("main view", "front view", "wrist view"), tag="Single Franka"),
    Robot("AGIBOT-challenge", 4, ("head view", *WRISTS), 2, "AGIBOT"),
    Robot("robomind-franka", 4, ("top view",), tag="Single Franka"),
    Robot("robomind-ur", 4, ("top view",), tag="Single UR"),
    Robot("Droid-Left", 4, ("left view", "wrist view"), tag="Single Franka"),
    Robot("Droid-Right", 4, ("right view", "wrist view"), tag="Single Franka"),
    Robot("AGIBOT", 4, ("head view", *WRISTS), 2, "AGIBOT"),
    Robot("robomind-agilex", 4, ("head view", *WRISTS), 2, "AgileX"),
    Robot("robomind-franka-dual", 4, ("front view", *WRISTS), 2, "Dual Franka"),
)
# Its challenge has all tasks in domain 0; 61 frames at 30 Hz (121 for the microwave and the clothes)
CHALLENGE = Robot("agiworld-challenge", 61 / 30, ("head view", *WRISTS), 2, "AGIBOT")
NO_VIEWS = ("widowx-air", "robocasa-human", "AIR-AGILEX", "AIRBOT")
TOKENIZER = "facebook/bart-large"
TOKENIZER_FILES = ["tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
CAMERAS = ("observation.images.image", "observation.images.image2", "observation.images.image3")


@dataclass(frozen=True)
class Steps:
    """What a checkpoint says of the observation; as the authors have it, who do not say it.

    cameras: keys of the dataset, in the order of the views.
    domain: `domain_ids` of all its data; `None`: of many.
    state: its channels; 0 where nothing says it.
    language_tokens: of the language in a row, padding included.
    tokenizer: its name on the Hub.
    num_views: of a row, with those that are always missing.
    """

    cameras: tuple[str, ...] = CAMERAS
    domain: int | None = None
    state: int = 0
    language_tokens: int = 50
    tokenizer: str = TOKENIZER
    num_views: int = 3


def read_steps(checkpoint: Checkpoint) -> Steps:
    """What LeRobot's config.json and policy_preprocessor.json say. ValueError where they normalise state or action."""
    if not checkpoint.is_port:
        return Steps()
    config, path = checkpoint.config, checkpoint.folder / "policy_preprocessor.json"
    stages = read_json(path).get("steps", []) if path.exists() else []
    found = {stage.get("registry_name"): stage.get("config") or {} for stage in stages}
    normalised = (found.get("normalizer_processor") or {}).get("norm_map") or {}
    changed = {kind: mode for kind, mode in normalised.items() if kind in ("STATE", "ACTION") and mode != "IDENTITY"}
    if changed:
        raise ValueError(f"{path.name} normalises {changed}; X-VLA sees states and actions as they are.")
    inputs = config.get("input_features") or {}
    renamed = found.get("rename_observations_processor", {}).get("rename_map") or {}
    renamed = {new: old for old, new in renamed.items()}
    cameras = [key for key, feature in inputs.items() if feature.get("type") == "VISUAL" and "empty_camera" not in key]
    words = found.get("tokenizer_processor", {})
    widths = [feature["shape"][-1] for feature in inputs.values() if feature.get("type") == "STATE"]
    views = config.get("num_image_views") or len(cameras) + config.get("empty_cameras", 0)
    return Steps(
        cameras=tuple(renamed.get(key, key) for key in cameras) or CAMERAS,
        domain=found.get("xvla_add_domain_id", {}).get("domain_id", 0),
        state=widths[0] if widths else 0,
        language_tokens=words.get("max_length", config.get("tokenizer_max_length", 64)),
        tokenizer=words.get("tokenizer_name", config.get("tokenizer_name", TOKENIZER)),
        num_views=max(views, len(cameras)) or len(CAMERAS),
    )


def domain_names(count: int, is_challenge: bool) -> list[str]:
    """Names of the domains of a checkpoint. Those of other numbers of domains than the published mean nothing here."""
    if count != len(DOMAINS):
        return [f"domain_{index}" for index in range(count)]
    return [CHALLENGE.domain, *DOMAINS[1:]] if is_challenge else list(DOMAINS)


def embodiment_of(robot: Robot, domains: list[str], horizon: int, cameras: tuple[str, ...] = CAMERAS) -> Embodiment:
    """A published robot, in the units of the published data: metres, rot6d, grippers as the handlers write them."""
    sides = ("left", "right")[: robot.arms]
    pairs = zip(cameras, robot.views, strict=False)
    parts = (("ee_position", 3), ("ee_rotation", 6), ("gripper", 1))
    layout = [[f"{side}_{part}", width] for side in sides for part, width in parts]
    if robot.is_relative:
        layout = [["native", 10 * robot.arms]]
    return Embodiment(
        cameras=dict(pairs),
        control_frequency=horizon / robot.seconds,
        action_horizon=horizon,
        state_layout=layout,
        action_layout=layout,
        rotation_format=f"rot6d_{robot.rot6d}",
        model_rot6d=robot.rot6d,
        normalization="none",
        domain=domains.index(robot.domain),
        robot_tag=robot.tag,
        arms=robot.arms,
    )


def native_robot(config: WallVLAConfig, steps: Steps, real: int) -> Embodiment:
    """A robot of action mode "joint" or "auto": numbers whose meaning nothing says, in the first channels."""
    return Embodiment(
        cameras={key: f"view {number}" for number, key in enumerate(steps.cameras, 1)},
        control_frequency=config.action_horizon,
        action_horizon=config.action_horizon,
        state_layout=[["native", min(steps.state or config.state_dim, config.state_dim)]],
        action_layout=[["native", real]],
        normalization="none",
        domain=steps.domain or 0,
    )


def published_robots(config: WallVLAConfig, steps: Steps, notes: list[str]) -> dict[str, Embodiment]:
    """The robots of a checkpoint by name; what had to be chosen goes to `notes`."""
    mode, domains, horizon = action_mode(config), list(config.domains), config.action_horizon
    if mode in ("joint", "auto"):
        notes.append(
            f"one robot of {mode} channels, a chunk in one second: neither its parts nor its control frequency are in "
            "the checkpoint; --embodiment NAME=FILE describes it"
        )
        return {"robot": native_robot(config, steps, sum(weight > 0 for weight in config.loss_channel_weights))}
    if len(domains) != len(DOMAINS):
        notes.append(f"no robots: {len(domains)} domains are not the published {len(DOMAINS)}; describe yours")
        return {}
    robots = (CHALLENGE,) if mode == "agibot_ee6d" else ROBOTS
    named = {robot.domain: embodiment_of(robot, domains, horizon) for robot in robots}
    for robot in robots:
        if domains.index(robot.domain) == steps.domain:
            if len(steps.cameras) < len(robot.views):
                robot = replace(robot, views=robot.views[: len(steps.cameras)])
            named[robot.domain] = embodiment_of(robot, domains, horizon, steps.cameras)
            notes.append(
                f"LeRobot's files: domain {steps.domain} ({robot.domain}), cameras {', '.join(steps.cameras)}; the "
                f"published data of this domain has the first {len(robot.views)}, --embodiment NAME=FILE another robot"
            )
    notes.append(
        "robots have the units of the published data: metres, rot6d, grippers as its handlers write them (mostly 1 is "
        f"closed); a chunk covers the seconds of its handler. {', '.join(NO_VIEWS)} have no robot, since their "
        "cameras are in no public file: --embodiment NAME=FILE describes one"
    )
    return named


def chosen(robots: dict[str, Embodiment], given: list[str]) -> dict[str, Embodiment]:
    """The robots that `--embodiment NAME` keeps and `NAME=FILE` describes; all without either."""
    if not given:
        return robots
    result = {}
    for item in given:
        name, _, file = item.partition("=")
        if not file and name not in robots:
            raise ValueError(
                f"--embodiment {name}: the checkpoint has no robot of that name. It has "
                f"{', '.join(robots) or 'none'}; describe another one with --embodiment {name}=FILE."
            )
        result[name] = Embodiment.from_dict(read_json(Path(file))) if file else robots[name]
    return result


def load_tokenizer(folder: Path, source: str) -> BartTokenizer:
    """BART's tokenizer with the image token: that of the checkpoint, or, where it has none, of `source`."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        folder = locate(source, TOKENIZER_FILES)
    tokenizer = BartTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [X_VLA.image_token]})
    return tokenizer


def load_image_processor(folder: Path, config: WallVLAConfig) -> CLIPImageProcessorPil:
    """The image processor of the checkpoint, which has to stretch to squares; Florence-2's at 224 without one."""
    fields = florence2_image_processor().to_dict()
    path = folder / "preprocessor_config.json"
    found = read_json(path) if path.exists() else {}
    known = ("size", "crop_size", "do_resize", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize")
    fields |= {name: found[name] for name in (*known, "resample", "image_mean", "image_std") if name in found}
    side = fields["size"].get("height", fields["size"].get("shortest_edge"))
    tokens = Florence2(config.vlm_config).image_tokens(side)
    return CLIPImageProcessorPil.from_dict(fields | {"image_seq_length": tokens})


def published_config(checkpoint: Checkpoint, steps: Steps, tokenizer: BartTokenizer) -> WallVLAConfig:
    """`WallVLAConfig` of a checkpoint."""
    values = checkpoint.config
    domains = domain_names(values.get("num_domains", 30), mode_of(values) == "agibot_ee6d")
    image_token_id = tokenizer.convert_tokens_to_ids(X_VLA.image_token)
    return x_vla_config(values, checkpoint.is_port, domains, image_token_id, steps.language_tokens)


def build_processor(
    checkpoint: Checkpoint, config: WallVLAConfig, steps: Steps, tokenizer: BartTokenizer, given: list[str]
) -> WallVLAProcessor:
    """The processor of a checkpoint; `given`: see `chosen`."""
    values, notes = checkpoint.config, checkpoint.notes
    image_processor = load_image_processor(checkpoint.folder, config)
    if values.get("resize_imgs_with_padding"):
        notes.append(
            "images are stretched to squares, as the authors train; LeRobot's config.json has "
            f"resize_imgs_with_padding {values['resize_imgs_with_padding']}, which pads images that are not square"
        )
    row = steps.num_views * image_processor.image_seq_length + steps.language_tokens
    room = config.action_expert.max_position_embeddings - config.action_horizon
    if row > room:
        raise ValueError(
            f"{steps.num_views} views and {steps.language_tokens} tokens of language are {row} tokens, the network "
            f"has positions for {room}: config.json and preprocessor_config.json disagree. Download them again."
        )
    processor = WallVLAProcessor(
        image_processor,
        tokenizer,
        chosen(published_robots(config, steps, notes), given),
        action_dim=config.action_dim,
        action_horizon=config.action_horizon,
        longest_side=None,
        state_dim=config.state_dim,
        proprioception="expert",
        prompt_format=replace(X_VLA, num_views=steps.num_views, language_length=steps.language_tokens),
    )
    processor.check_model(config)
    return processor
