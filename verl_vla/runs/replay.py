"""Videos of earlier episodes, from their actions in an episode log.

The simulator is deterministic (ADR-0005), so only the start and the actions of an episode have to
be kept. The replayed outcome and number of steps are compared with the episode log.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.suite import libero_suite, make_libero_env
from verl_vla.runs.episode_log import actions_of, read_header, stream_episodes
from verl_vla.runs.video import FRAME_SIZE, FRAMES_PER_S, HOLD_FRAMES

CAPTION_HEIGHT = 48
CHUNK_HEIGHT = 92
ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "grip")
INK, QUIET, LINE, NOW, BAR = "#ffffff", "#9aa4af", "#3a424c", "#f59e0b", "#5b8def"

SHOWN_EPISODES = 8
"""Episodes that a message names where there is none of the wanted number."""

Frame = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Caption and action chunk that are shown with one image of an episode."""

    instruction: str
    chunk: npt.NDArray[np.float32]
    """Actions of the current policy step, [K, A], simulator units."""
    index: int
    """Index in the chunk of the action that led to the image; -1 before the first."""
    step: int
    progress: float | None
    """True progress after the last complete policy step; None if the log does not hold it."""
    verdict: str


def read_episode(folder: Path, episode: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the header of an episode log and the line of one episode.

    Raises:
        ConfigError: there is no such episode, or its actions were not kept; the message names some
            whose actions were.
    """
    header = read_header(folder)
    found: dict[str, Any] | None = None
    kept: deque[int] = deque(maxlen=SHOWN_EPISODES)
    # a log may be larger than memory, so one line is held at a time
    for line in stream_episodes(folder):
        has_actions = line["actions"] is not None
        if line["episode"] == episode and (found is None or has_actions):
            found = line
        if has_actions:
            kept.append(line["episode"])
    if found is None or found["actions"] is None:
        why = "it was not played" if found is None else "its actions were not kept"
        some = ", ".join(map(str, kept)) if kept else "none"
        raise ConfigError(f"--episode is {episode}, but {why}; the last that can be: {some}")
    return header, found


def replay(header: Mapping[str, Any], line: Mapping[str, Any]) -> list[Frame]:
    """Replay an episode and render every step of it.

    Args:
        header: header of the episode log, see `verl_vla.evaluation.conditions.played_in`.
        line: line of the episode, with its actions.

    Returns:
        Images [H, W, 3], the start first; the last one is repeated for a second.

    Raises:
        ConfigError: outcome or number of steps differ from the episode log.
    """
    config = env_of(header, line["task"])
    # a second simulator renders, so that rendering cannot change the episode
    env, camera = (
        make_libero_env(config),
        make_libero_env(replace(config, render_size=FRAME_SIZE)),
    )
    actions = actions_of(line)
    frames: list[Frame] = []
    outcome: Outcome | None = None
    step = 0
    try:
        instruction = env.reset(line["task"], line["init_state"]).instruction

        def draw(policy_step: int, index: int) -> None:
            camera.restore(env.snapshot())
            seen = camera.simulator(line["task"]).render(config.cameras[0])
            scene = Scene(
                instruction=instruction,
                chunk=actions[policy_step],
                index=index,
                step=step,
                # entry i is read before policy step i; the end of the episode has the next one
                progress=_progress(line, policy_step + (outcome is not None)),
                verdict=_verdict(line) if outcome is not None else "",
            )
            frames.append(compose(seen, scene))

        draw(0, -1)
        for policy_step, executed in enumerate(line["executed"]):
            # an episode may end inside a chunk; the rest of its actions never ran
            for index in range(executed):
                outcome = env.step(actions[policy_step, index].astype(np.float64))
                step += 1
                draw(policy_step, index)
    finally:
        env.close()
        camera.close()
    # a replay that differs would show an episode that never happened
    if outcome != line["outcome"] or step != line["steps"]:
        raise ConfigError(
            f"episode {line['episode']} ended as {Outcome(line['outcome']).name} after "
            f"{line['steps']} steps, and here as {outcome and outcome.name} after {step}; this "
            "machine simulates otherwise: compare the versions of mujoco, robosuite and hf-libero"
        )
    return frames + frames[-1:] * HOLD_FRAMES


def env_of(header: Mapping[str, Any], task: int) -> EnvConfig:
    """Return the environment in which the episodes of one task of an episode log were played."""
    name = libero_suite(header["suite"]).task(task).name
    return EnvConfig(
        suite=header["suite"],
        step_limit=header["step_limits"][name],
        render_size=header["render_size"],
        image_size=header["image_size"],
        settle_steps=header["settle_steps"],
        fixtures=header["fixtures"],
    )


def compose(seen: Frame, scene: Scene) -> Frame:
    """Put an image between its caption and the plot of the current action chunk."""
    width, height = seen.shape[1], seen.shape[0]
    sheet = Image.new("RGB", (width, CAPTION_HEIGHT + height + CHUNK_HEIGHT), "#12161b")
    sheet.paste(Image.fromarray(seen), (0, CAPTION_HEIGHT))
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 4), scene.instruction, fill=INK, font=ImageFont.load_default(size=15))
    _draw_progress(draw, scene, width)
    _draw_chunk(draw, scene, top=CAPTION_HEIGHT + height + 6, width=width)
    return np.asarray(sheet)


def write_video(path: Path, frames: list[Frame]) -> None:
    """Write an MP4 that plays at the robot's real speed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # macro_block_size: imageio's 16 would scale a frame whose sides are no multiples of it
    imageio.imwrite(path, np.stack(frames), fps=FRAMES_PER_S, codec="libx264", macro_block_size=4)


def _progress(line: Mapping[str, Any], policy_steps: int) -> float | None:
    return line["progress"][policy_steps] if line["progress"] else None


def _verdict(line: Mapping[str, Any]) -> str:
    how = "solved" if line["outcome"] == Outcome.SUCCESS else "not solved"
    # an evaluation has no reward, and a crashed episode no score
    has_score = "score" in line and line["score"] is not None
    return f"{how}, reward {line['score']:.2f}" if has_score else how


def _draw_progress(draw: ImageDraw.ImageDraw, scene: Scene, width: int) -> None:
    font = ImageFont.load_default(size=12)
    says = f"step {scene.step}" + (f", {scene.verdict}" if scene.verdict else "")
    draw.text((8, 25), says, fill=QUIET, font=font)
    if scene.progress is not None:
        left, right = width - 150, width - 8
        draw.text((left - 92, 25), f"progress {100 * scene.progress:3.0f}%", fill=QUIET, font=font)
        draw.rectangle((left, 30, right, 37), outline=LINE)
        draw.rectangle((left, 30, left + round((right - left) * scene.progress), 37), fill=BAR)


def _draw_chunk(draw: ImageDraw.ImageDraw, scene: Scene, *, top: int, width: int) -> None:
    """Draw a column per value and a bar per action, from -1 below the line to +1 above it."""
    font = ImageFont.load_default(size=11)
    num_actions, num_values = scene.chunk.shape
    column = (width - 16) / num_values
    middle, reach = top + 32, 28
    bar = (column - 8) / num_actions
    for value in range(num_values):
        left = 8 + value * column
        draw.text((left, top + 66), ACTION_NAMES[value], fill=QUIET, font=font)
        draw.line((left, middle, left + column - 8, middle), fill=LINE)
        for action in range(num_actions):
            # a value beyond the simulator's -1 to 1 would be drawn over the captions
            height = float(np.clip(scene.chunk[action, value], -1, 1)) * reach
            x = left + action * bar
            box = (x, min(middle, middle - height), x + bar - 1, max(middle, middle - height))
            draw.rectangle(box, fill=NOW if action == scene.index else BAR)
