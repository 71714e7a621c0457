"""Prompts as data: what each published system writes around images, instruction and state.

A `PromptFormat` for each: `WALL_OSS`, `QWEN_VLA`, `X_VLA`, `X_VLA_LANGUAGE_PROMPTS`, `QWEN_CHAT`, `INTERN_VL`. A
checkpoint carries its own, as JSON.
"""

from dataclasses import asdict, dataclass, fields, replace
from string import Formatter

from .action_space_wallvla import Embodiment


STATE_TOKEN = "<|propri|>"  # stands for a projected state

# What each text may name in braces
ROBOT_WORDS = ("system", "robot_tag", "arms", "waist", "mobile_base", "frequency", "horizon", "all_views")
PLACES = {
    "action": ("views", "instruction", "state", *ROBOT_WORDS),
    "navigation": ("views", "instruction", "state", *ROBOT_WORDS),
    "text": ("system", "images", "text"),
    "view": ("label", "image"),
    "image": ("image_token",),
    "state": ("numbers",),
}


@dataclass(frozen=True)
class PromptFormat:
    """How a system writes its prompts. `from_dict` and `to_dict` are its JSON form, which travels in the checkpoint.

    Texts are format strings. In `action` and `navigation`, `{views}` is one `view` for each camera, `{state}` the
    `state` (nothing without one), and the rest comes from the `Embodiment`: `{system}` its prompt; `{robot_tag}`;
    `{arms}` "single arm" or "dual arms"; `{waist}` and `{mobile_base}` ", waist" and ", and mobile base", or nothing;
    `{frequency}` of control in Hz; `{horizon}` in steps; `{all_views}` the labels of all its cameras, each once.

    Args:
        action: prompt of an action sample.
        text: prompt of a multimodal sample; `{images}` is one `image` for each. Empty: the system has no such samples.
        image: one image; `{image_token}` becomes as many tokens as the image has.
        image_token, end_token: special tokens of the tokenizer; the second ends a turn.
        view: one camera, `{label}` and `{image}`.
        navigation: prompt of robots without arms (`Embodiment.arms` 0). Empty: as `action`.
        state: the proprioception, `{numbers}` in bins (or STATE_TOKEN, if it is projected).
        separator: between two of the numbers.
        view_tokens: texts with `{label}` that are one token each; the processor adds them to the tokenizer for each
            camera of its robots.
        fewest_views: images that an action sample has at least.
        special_tokens: whether the tokenizer puts its own special tokens around the prompt.
        num_views, language_length: above 0, all rows have the same layout and length: the first view's image tokens;
            the prompt, padded on its right to `language_length` tokens; the image tokens of the `num_views - 1` other
            views. `action` then has no `{views}`. 0 and 0: the images are where the prompt has them.
    """

    action: str
    text: str
    image: str
    image_token: str
    end_token: str
    view: str = "{image}"
    navigation: str = ""
    state: str = "{numbers}"
    separator: str = " "
    view_tokens: tuple = ()
    fewest_views: int = 1
    special_tokens: bool = False
    num_views: int = 0
    language_length: int = 0

    @classmethod
    def from_dict(cls, values: dict) -> "PromptFormat":
        """Format of a (JSON) dictionary. Raises ValueError on unknown, missing and contradicting fields."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        missing = [name for name in ("action", "text", "image", "image_token", "end_token") if name not in values]
        if unknown or missing:
            raise ValueError(
                f"Found unknown field(s) {', '.join(unknown) or 'none'} in a prompt format, missing "
                f"{', '.join(missing) or 'none'}. Known: {', '.join(known)}. Correct the name; a prompt other than "
                f"that of training makes a policy fail without a word."
            )
        return cls(**values)

    def to_dict(self) -> dict:
        """JSON form; `from_dict(to_dict())` is equal to this format."""
        return {**asdict(self), "view_tokens": list(self.view_tokens)}

    def __post_init__(self):
        object.__setattr__(self, "view_tokens", tuple(self.view_tokens))
        texts = {name: (vars(self)[name], places) for name, places in PLACES.items()}
        texts |= {f"view_tokens[{index}]": (text, ("label",)) for index, text in enumerate(self.view_tokens)}
        for name, (text, places) in texts.items():
            unknown = {field for _, field, _, _ in Formatter().parse(text) if field is not None} - set(places)
            if unknown:
                raise ValueError(
                    f"Found {{{'}, {'.join(sorted(unknown))}}} in {name} of a prompt format. Known there: "
                    f"{', '.join(places)}. Write a brace that is meant as such twice."
                )
        in_prompt = [("{views}" in prompt) for prompt in (self.action, self.navigation or self.action)]
        if (self.num_views > 0) != (self.language_length > 0) or (self.num_views > 0) != (not any(in_prompt)):
            raise ValueError(
                f"Found num_views {self.num_views}, language_length {self.language_length} and an action prompt "
                f"{'with' if any(in_prompt) else 'without'} {{views}}. Images are either inside the prompt, or have "
                f"places of their own: then both numbers are above 0 and the prompt has no {{views}}."
            )
        if self.num_views and self.text:
            raise ValueError("Found num_views and a text prompt. Rows of one length cannot hold text to be generated.")

    # ---- writing ------------------------------------------------------------------------------------------------

    def write_action(self, robot: Embodiment, cameras: list[str], instruction: str, numbers: list | None) -> str:
        """Prompt of an action sample, with one image token per image that is inside it.

        Args:
            robot: whose prompt it is.
            cameras: labels of the views that the sample shows, in order.
            instruction: the task.
            numbers: what stands for the proprioception; `None` without one.
        """
        image = self.image.format(image_token=self.image_token)
        template = self.navigation if self.navigation and robot.arms == 0 else self.action
        state = "" if numbers is None else self.state.format(numbers=self.separator.join(map(str, numbers)))
        return template.format(
            system=robot.prompt,
            robot_tag=robot.robot_tag,
            arms="dual arms" if robot.arms == 2 else "single arm",
            waist=", waist" if robot.waist else "",
            mobile_base=", and mobile base" if robot.mobile_base else "",
            frequency=f"{robot.control_frequency:.10g}",
            horizon=robot.action_horizon,
            all_views=" / ".join(dict.fromkeys(robot.cameras.values())),
            views="".join(self.view.format(label=label, image=image) for label in cameras),
            instruction=instruction,
            state=state,
        )

    def write_text(self, system: str, images: int, text: str) -> str:
        """Prompt of a multimodal sample with so many images. Raises ValueError if the system has no such samples."""
        if not self.text:
            raise ValueError(
                "Found a multimodal sample (`text`), the prompt format has no prompt for one: this system reads and "
                "writes actions only. Leave such samples out, or use another system."
            )
        image = self.image.format(image_token=self.image_token)
        return self.text.format(system=system, images=image * images, text=text)

    def tokens_of_views(self, robot: Embodiment) -> list[str]:
        """The tokens that the tokenizer needs for the cameras of a robot."""
        return [text.format(label=label) for label in robot.cameras.values() for text in self.view_tokens]


# ---------------------------------------------------------------------------------------------------------------------
# Wall-OSS
# ---------------------------------------------------------------------------------------------------------------------

# As in the published training code; `tests/test_processing.py` has it written out.
WALL_OSS = PromptFormat(
    action=(
        "<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\nObservation:{views}\nInstruction: {instruction}\n"
        "Predict the next action in robot action.\nProprioception: {state}\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    text="<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{images}{text}<|im_end|>\n<|im_start|>assistant\n",
    view=" {label}: {image}",
    image="<|vision_start|>{image_token}<|vision_end|>",
    image_token="<|image_pad|>",
    end_token="<|im_end|>",
)

# ---------------------------------------------------------------------------------------------------------------------
# Qwen-VLA
# ---------------------------------------------------------------------------------------------------------------------

# The template of section 2.3, the views of section 3.2.1, the state of section 5.2.4 (which the default leaves out:
# `proprioception="none"`). The paper does not say more, so ours are: the chat turn around it; prompt before views
# ("each training sample is prefixed with"), the stock delimiters of an image inside the view's; the sentence for
# navigation ("analogously states the navigation convention and waypoint horizon"). `fewest_views` is 0 because its
# first stage, T2A, shows no images. Labels of cameras are the paper's tags: ego, cam_left_wrist, cam_right_wrist.
_CONTROL = " The control frequency is {frequency} Hz. Please predict the next {horizon} "
QWEN_VLA = PromptFormat(
    action=(
        "<|im_start|>user\n"
        "The robot is {robot_tag} with {arms}{waist}{mobile_base}."
        + _CONTROL
        + "control actions to execute the following task: {state}{instruction}."
        "{views}<|im_end|>\n<|im_start|>assistant\n"
    ),
    navigation=(
        "<|im_start|>user\n"
        "The robot is {robot_tag}, which moves in the ground plane."
        + _CONTROL
        + "waypoints (dx, dy, dtheta), each the relative displacement and heading change, to execute the following "
        "task: {state}{instruction}."
        "{views}<|im_end|>\n<|im_start|>assistant\n"
    ),
    text="<|im_start|>user\n{images}{text}<|im_end|>\n<|im_start|>assistant\n",
    view="<|{label}_start|>{image}<|{label}_end|>",
    view_tokens=("<|{label}_start|>", "<|{label}_end|>"),
    state="state: [{numbers}] ",
    separator=", ",
    image="<|vision_start|>{image_token}<|vision_end|>",
    image_token="<|image_pad|>",
    end_token="<|im_end|>",
    fewest_views=0,
)

# ---------------------------------------------------------------------------------------------------------------------
# X-VLA
# ---------------------------------------------------------------------------------------------------------------------

# The instruction alone, as Florence-2's BART tokenizer writes it; main view and language go through the whole
# encoder, the other views through the vision tower alone. The padding of the language is attended to, as published.
X_VLA = PromptFormat(
    action="{instruction}",
    text="",
    image="{image_token}",
    image_token="<image>",
    end_token="</s>",
    special_tokens=True,
    num_views=3,
    language_length=50,
)

# The baseline of table 10, without soft prompts. The paper says "concatenated with the task instruction"; the full
# stop between the two is ours. There the robot_tag holds the arms ("Single Franka") and labels are "Left View".
X_VLA_LANGUAGE_PROMPTS = replace(
    X_VLA, action="Embodiment: {robot_tag}, Camera Setup: {all_views}, Freq: {frequency}Hz. {instruction}"
)

# ---------------------------------------------------------------------------------------------------------------------
# "Rethinking VLA scaling"
# ---------------------------------------------------------------------------------------------------------------------

# The paper gives no prompt: Wall-OSS' wording in the chat format of the backbone (Qwen2.5-VL, Qwen3-VL, Qwen3.5),
# without the line of the state, which goes to the action expert.
QWEN_CHAT = replace(
    WALL_OSS,
    action=(
        "<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\nObservation:{views}\nInstruction: {instruction}\n"
        "Predict the next action in robot action.<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
)
INTERN_VL = replace(QWEN_CHAT, image="<img>{image_token}</img>", image_token="<IMG_CONTEXT>")
