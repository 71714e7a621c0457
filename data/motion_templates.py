"""Tasks of one arm in words and as waypoints: the six template families of Qwen-VLA (section 3.2.3, "Language-action
data"). Every quantity that the motion depends on is either in the sentence or a constant of this file.

The robot stands at the origin of a table, the plane z = 0: x points forward, y to the left, z up, in metres. The
gripper points down; its heading is its angle about z from forward, counter-clockwise seen from above, in radians.
Numbers are drawn in whole centimetres and in steps of 15 degrees, so a sentence says them exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


# Height in metres at which an object is gripped, and its half width: what a name stands for.
OBJECTS = {
    "apple": (0.04, 0.035),
    "block": (0.03, 0.025),
    "bottle": (0.10, 0.030),
    "can": (0.06, 0.030),
    "cup": (0.05, 0.040),
    "mug": (0.05, 0.040),
    "sponge": (0.02, 0.030),
    "tin": (0.04, 0.040),
}
COLOURS = ("black", "blue", "green", "orange", "purple", "red", "white", "yellow")
SURFACES = ("tray", "plate", "mat", "coaster")
LIFT_M = 0.15  # how far an object is lifted, and the gripper above it before and after
CLEARANCE_M = 0.03  # between gripper and object before a push
SPACING_M = 0.12  # smallest distance between two places
STEP_DEGREES = 15
_TRIES = 1000  # draws of numbers before a workspace counts as too small


@dataclass(frozen=True)
class Workspace:
    """Where objects may lie: an annular sector in front of the robot.

    Args:
        nearest, farthest: distance from the robot's axis in metres.
        azimuth: largest angle to either side of forward in degrees.
        home: (x, z) of the gripper before a task, in metres; y is 0 and its heading 0.
    """

    nearest: float
    farthest: float
    azimuth: float
    home: tuple[float, float]

    def holds(self, place: np.ndarray) -> bool:
        """Whether (x, y) lies inside."""
        x, y = place
        return self.nearest <= np.hypot(x, y) <= self.farthest and abs(np.degrees(np.arctan2(y, x))) <= self.azimuth


@dataclass(frozen=True)
class Task:
    """A sentence and the motion it describes.

    Args:
        template: one of TEMPLATES.
        instruction: the sentence.
        waypoints: float64 (W, 5): x, y, z of the gripper, heading, gripper (0 closed, 1 open). From one to the next
            either the pose changes or the gripper.
    """

    template: str
    instruction: str
    waypoints: np.ndarray


class _Motion:
    """Waypoints in the making; every method appends."""

    def __init__(self, workspace: Workspace):
        x, z = workspace.home
        self.rows = [np.array([x, 0.0, z, 0.0, 1.0])]

    def go(self, place: np.ndarray, height: float, heading: float | None = None):
        row = self.rows[-1].copy()
        row[:3] = *place, height
        row[3] = row[3] if heading is None else heading
        self.rows.append(row)

    def grip(self, opening: float):
        row = self.rows[-1].copy()
        row[4] = opening
        self.rows.append(row)

    def pick(self, place: np.ndarray, height: float, heading: float = 0.0):
        self.go(place, height + LIFT_M, heading)
        self.go(place, height)
        self.grip(0.0)

    def carry(self, source: np.ndarray, target: np.ndarray, height: float, heading: float | None = None):
        """With an object in the gripper: up, across, down, open, up."""
        self.go(source, height + LIFT_M)
        self.go(target, height + LIFT_M, heading)
        self.go(target, height)
        self.release(target, height)

    def release(self, place: np.ndarray, height: float):
        self.grip(1.0)
        self.go(place, height + LIFT_M)


# --------------------------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------------------------


class _Words:
    """Random wordings of objects and quantities, one style of numbers per sentence."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        self._metres = bool(rng.integers(2))

    def choose(self, options):
        return options[int(self._rng.integers(len(options)))]

    def length(self, metres: float) -> str:
        return f"{metres:.2f} m" if self._metres else f"{round(metres * 100)} cm"

    def place(self, place: np.ndarray) -> str:
        x, y = place
        side = "left" if y > 0 else "right"
        wordings = (
            f"{self.length(x)} forward and {self.length(abs(y))} to the {side}",
            f"{self.length(x)} ahead of the base and {self.length(abs(y))} to its {side}",
            f"{self.length(x)} in front and {self.length(abs(y))} on the {side}",
        )
        return self.choose(wordings)

    def move(self, move: np.ndarray) -> str:
        """A displacement along one or two axes, sideways first: `place` says it the other way round."""
        parts = []
        if move[1]:
            parts.append(f"{self.length(abs(move[1]))} to the {'left' if move[1] > 0 else 'right'}")
        if move[0]:
            words = ("forward", "further from the robot") if move[0] > 0 else ("backward", "closer to the robot")
            parts.append(f"{self.length(abs(move[0]))} {self.choose(words)}")
        return " and ".join(parts)

    def turn(self, degrees: int) -> str:
        return f"{abs(degrees)} degrees {'counter-clockwise' if degrees > 0 else 'clockwise'}"

    def view(self, degrees: int) -> str:
        """A direction seen from the robot."""
        if degrees == 0:
            return "straight ahead"
        side = "left" if degrees > 0 else "right"
        return self.choose(
            (f"{abs(degrees)} degrees to the {side}", f"{abs(degrees)} degrees {side} of straight ahead")
        )

    def grip_heading(self, degrees: int) -> str:
        """The last clause of a sentence about a gripper that is turned before it closes."""
        if degrees == 0:
            return ""
        return f", with the gripper turned {self.turn(degrees)}"


class _Draw:
    """The random numbers and words of one task."""

    def __init__(self, workspace: Workspace, rng: np.random.Generator):
        self.workspace, self._rng, self.words = workspace, rng, _Words(rng)
        self.motion = _Motion(workspace)

    def choose(self, options):
        return self.words.choose(options)

    def things(self, count: int) -> list[tuple[str, float, float]]:
        """Different objects: (colour and name, grip height, half width)."""
        names = self._rng.permutation(list(OBJECTS))[:count]
        return [(f"{self.choose(COLOURS)} {name}", *OBJECTS[name]) for name in names]

    def until(self, draw: Callable[[], object], fits: Callable[[object], bool]):
        """The first of the draws that fits."""
        for _ in range(_TRIES):
            drawn = draw()
            if fits(drawn):
                return drawn
        raise ValueError(f"{self.workspace} has no room for a task: no fitting place in {_TRIES} draws. Widen it.")

    def place(self, *others: np.ndarray) -> np.ndarray:
        """A place off the middle line, away from the others."""
        reach = round(self.workspace.farthest * 100)

        def draw():
            return np.array([self._rng.integers(0, reach + 1), self._rng.integers(-reach, reach + 1)]) / 100

        def fits(place):
            apart = all(np.hypot(*(place - other)) >= SPACING_M for other in others)
            return place[1] != 0 and place[0] > 0 and apart and self.workspace.holds(place)

        return self.until(draw, fits)

    def places_and_move(self, axes: int) -> tuple[np.ndarray, np.ndarray]:
        """A place and a displacement along up to so many axes, 5 to 30 cm each, that ends inside the workspace."""

        def draw():
            move = self._rng.integers(5, 31, size=2) * self._rng.choice([-1, 1], size=2) / 100
            if axes == 1 or self._rng.integers(2):
                move[self._rng.integers(2)] = 0.0
            return self.place(), move

        return self.until(draw, lambda drawn: self.workspace.holds(drawn[0] + drawn[1]))

    def degrees(self, largest: int, zero: bool) -> int:
        """A multiple of STEP_DEGREES up to `largest` to either side."""
        steps = largest // STEP_DEGREES
        return STEP_DEGREES * int(self.until(lambda: self._rng.integers(-steps, steps + 1), lambda n: zero or n != 0))

    def grip_degrees(self) -> int:
        """0 in half of the tasks."""
        return self.degrees(45, zero=False) if self._rng.integers(2) else 0


# --------------------------------------------------------------------------------------------------------------------
# Templates: each fills the motion and returns the sentence
# --------------------------------------------------------------------------------------------------------------------


def _pick_place(draw: _Draw) -> str:
    words, ((thing, height, _),) = draw.words, draw.things(1)
    degrees = draw.grip_degrees()
    if draw.choose((True, False)):
        source, move = draw.places_and_move(axes=2)
        target, source_text = source + move, words.place(source)
        sentence = draw.choose(
            (
                f"Pick up the {thing} at {source_text} and place it {words.move(move)} from there",
                f"Take the {thing} at {source_text} and set it down {words.move(move)} from there",
                f"Grab the {thing} that is {source_text}, then put it {words.move(move)} from where it was",
            )
        )
    else:
        source = draw.place()
        target = draw.place(source)
        goal, source_text = f"the {draw.choose(SURFACES)} at {words.place(target)}", words.place(source)
        sentence = draw.choose(
            (
                f"Pick up the {thing} at {source_text} and place it on {goal}",
                f"Carry the {thing} from {source_text} to {goal}",
                f"Put the {thing} that is {source_text} onto {goal}",
            )
        )
    draw.motion.pick(source, height, np.radians(degrees))
    draw.motion.carry(source, target, height)
    return sentence + words.grip_heading(degrees)


def _push(draw: _Draw) -> str:
    words, ((thing, height, half_width),) = draw.words, draw.things(1)

    def inside(drawn):
        place, move = drawn
        return draw.workspace.holds(_push_ends(place, move, half_width)[0])

    place, move = draw.until(lambda: draw.places_and_move(axes=1), inside)
    start, end = _push_ends(place, move, half_width)
    draw.motion.grip(0.0)
    draw.motion.go(start, height + LIFT_M)
    draw.motion.go(start, height)
    draw.motion.go(end, height)
    draw.motion.go(end, height + LIFT_M)
    place_text, move_text = words.place(place), words.move(move)
    return draw.choose(
        (
            f"Push the {thing} at {place_text} by {move_text}",
            f"Slide the {thing} at {place_text} by {move_text}",
            f"Nudge the {thing} that is {place_text} until it has moved {move_text}",
        )
    )


def _push_ends(place: np.ndarray, move: np.ndarray, half_width: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the gripper starts and ends: behind the object with a clearance, and touching it at its goal."""
    direction = move / np.hypot(*move)
    return place - direction * (half_width + CLEARANCE_M), place + move - direction * half_width


def _pull(draw: _Draw) -> str:
    words, ((thing, height, _),) = draw.words, draw.things(1)
    degrees = draw.grip_degrees()
    place, move = draw.places_and_move(axes=1)
    draw.motion.pick(place, height, np.radians(degrees))
    draw.motion.go(place + move, height)
    draw.motion.release(place + move, height)
    place_text, move_text = words.place(place), words.move(move)
    sentence = draw.choose(
        (
            f"Pull the {thing} at {place_text} by {move_text}",
            f"Without lifting it, drag the {thing} at {place_text} by {move_text}",
            f"Grip the {thing} that is {place_text} and draw it {move_text} over the table",
        )
    )
    return sentence + words.grip_heading(degrees)


def _rotate_place(draw: _Draw) -> str:
    words, ((thing, height, _),) = draw.words, draw.things(1)
    degrees = draw.degrees(90, zero=False)
    place, move = draw.places_and_move(axes=2)
    draw.motion.pick(place, height)
    draw.motion.carry(place, place + move, height, np.radians(degrees))
    place_text, move_text, turn = words.place(place), words.move(move), words.turn(degrees)
    return draw.choose(
        (
            f"Pick up the {thing} at {place_text}, turn it {turn} and place it {move_text} from there",
            f"Rotate the {thing} at {place_text} by {turn} while moving it {move_text}",
            f"Take the {thing} that is {place_text} and set it down {move_text} from there, rotated {turn}",
        )
    )


def _rotate_view(draw: _Draw) -> str:
    words, ((thing, height, _),) = draw.words, draw.things(1)
    place = draw.place()
    grip = draw.degrees(45, zero=True)
    degrees = draw.until(lambda: draw.degrees(90, zero=True), lambda view: view != grip)
    draw.motion.pick(place, height, np.radians(grip))
    draw.motion.carry(place, place, height, np.radians(degrees))
    place_text, view = words.place(place), words.view(degrees)
    now = f", which faces {words.view(grip)}," if grip else ""
    return draw.choose(
        (
            f"Lift the {thing} at {place_text}{now} and turn it to face {view}",
            f"Take the {thing} that is {place_text}{now} and point it {view}",
            f"Turn the {thing} at {place_text}{now} so that it looks {view}",
        )
    )


def _swap(draw: _Draw) -> str:
    words, (one, other) = draw.words, draw.things(2)
    first = draw.place()
    second = draw.place(first)
    spare = draw.place(first, second)
    for (_, height, _), source, target in ((one, first, spare), (other, second, first), (one, spare, second)):
        draw.motion.pick(source, height)
        draw.motion.carry(source, target, height)
    first_text, second_text, spare_text = words.place(first), words.place(second), words.place(spare)
    return draw.choose(
        (
            f"Swap the {one[0]} at {first_text} with the {other[0]} at {second_text}, using the free spot "
            f"{spare_text}",
            f"Exchange the {one[0]} that is {first_text} and the {other[0]} that is {second_text}; put the first one "
            f"down at {spare_text} meanwhile",
            f"Let the {one[0]} at {first_text} and the {other[0]} at {second_text} trade places by way of the spot "
            f"{spare_text}",
        )
    )


TEMPLATES: dict[str, Callable[[_Draw], str]] = {
    "pick_place": _pick_place,
    "push": _push,
    "pull": _pull,
    "rotate_place": _rotate_place,
    "rotate_view": _rotate_view,
    "swap": _swap,
}


def draw_task(template: str, workspace: Workspace, rng: np.random.Generator) -> Task:
    """A random task of a template inside a workspace.

    Raises:
        ValueError: the workspace is too small for it.
    """
    draw = _Draw(workspace, rng)
    sentence = TEMPLATES[template](draw)
    return Task(template, sentence + ".", np.stack(draw.motion.rows))
