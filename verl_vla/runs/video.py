"""Videos of single episodes.

The episode runs in its usual environment. For each frame its snapshot is restored in a second
simulator, which renders a larger image; so rendering cannot change the episode.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from verl_vla.core.episode import Observation, Outcome, Start
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.policies.base import Policy
from verl_vla.rl.rollout import NoiseSource

FRAMES_PER_S = 20
"""Frame rate of a frame per step: LIBERO's control rate, so a video runs at real speed."""
STEPS_PER_FRAME = 2
"""Simulator steps between two frames of `record_videos`; rendering costs more than physics."""

FRAME_SIZE = 384
"""Height and width of one image, pixels."""

CAPTION_HEIGHT = 60
LINE_LENGTH = 50
"""Characters of an instruction that fit beside each other; LIBERO's longest takes two lines."""
HOLD_FRAMES = 20
"""Number of times that the last frame is repeated."""

Frames = list[npt.NDArray[np.uint8]]
Actions = npt.NDArray[np.float32]
"""An action chunk [K, A]."""
Sample = Callable[[Policy, Observation, int], Actions]
"""Function that gives a policy's actions for an observation and the number of the policy step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoClip:
    """One recorded episode."""

    frames: Frames
    """Images [FRAME_SIZE, FRAME_SIZE, 3]: start, one every `STEPS_PER_FRAME` steps, and end."""
    outcome: Outcome
    num_steps: int
    instruction: str

    @property
    def verdict(self) -> str:
        """Outcome and length of the episode, in words."""
        how = "solved" if self.outcome is Outcome.SUCCESS else "not solved"
        return f"{how} after {self.num_steps} steps"


def sampler_of(temperature: float, noise: NoiseSource, episode_id: int) -> Sample:
    """Return the sampler with which `rollout` plays an episode, so that its video is the same."""

    def sample(policy: Policy, seen: Observation, policy_step: int) -> Actions:
        numbers = noise.uniform(episode_id, policy_step, policy.shape.num_tokens)
        chunk = policy.act([seen], torch.from_numpy(numbers)[None], temperature=temperature)
        return chunk.actions[0]

    return sample


def record_videos(
    policies: Sequence[Policy], config: EnvConfig, start: Start, sample: Sample
) -> list[VideoClip]:
    """Roll out one episode of each policy from the same start, and render it.

    Args:
        policies: policies that act, as in an evaluation.
        config: environment as in the evaluation; the videos have a larger render size.
        start: the recorded start.
        sample: gives the actions; see `sampler_of`.
    """
    env = make_libero_env(config)
    camera = make_libero_env(replace(config, render_size=FRAME_SIZE))
    try:
        return [_record(partial(sample, policy), env, camera, start) for policy in policies]
    finally:
        env.close()
        camera.close()


def _record(
    act: Callable[[Observation, int], Actions], env: LiberoEnv, camera: LiberoEnv, start: Start
) -> VideoClip:
    seen = env.reset(start.task_id, start.init_state_id)
    instruction = seen.instruction
    frames = [_frame(env, camera, start.task_id)]
    outcome: Outcome | None = None
    num_steps = 0
    policy_steps = count()
    while outcome is None:
        for action in act(seen, next(policy_steps)):
            outcome = env.step(action.astype(np.float64))
            num_steps += 1
            if outcome is not None or num_steps % STEPS_PER_FRAME == 0:
                frames.append(_frame(env, camera, start.task_id))
            if outcome is not None:
                break
        else:
            # reached without a break only: an episode that has ended shows nothing to decide on
            seen = env.observe()
    return VideoClip(frames=frames, outcome=outcome, num_steps=num_steps, instruction=instruction)


def _frame(env: LiberoEnv, camera: LiberoEnv, task_id: int) -> npt.NDArray[np.uint8]:
    camera.restore(env.snapshot())
    return camera.simulator(task_id).render(env.config.cameras[0])


def write_side_by_side(path: Path, clips: Sequence[tuple[str, VideoClip]]) -> None:
    """Write clips of the same start side by side, each under its caption."""
    length = max(len(clip.frames) for _, clip in clips) + HOLD_FRAMES
    columns = [_captioned(title, clip, length) for title, clip in clips]
    video = [np.concatenate(images, axis=1) for images in zip(*columns, strict=True)]
    rate = FRAMES_PER_S / STEPS_PER_FRAME
    # macro_block_size: imageio's 16 would scale a frame whose sides are no multiples of it
    imageio.imwrite(path, np.stack(video), fps=rate, codec="libx264", macro_block_size=4)


def _captioned(title: str, clip: VideoClip, length: int) -> Frames:
    font = ImageFont.load_default(size=15)
    images: Frames = []
    for i in range(length):
        # the shorter of two episodes stands still at its end
        frame = clip.frames[min(i, len(clip.frames) - 1)]
        is_over = i >= len(clip.frames) - 1
        sheet = Image.new("RGB", (FRAME_SIZE, FRAME_SIZE + CAPTION_HEIGHT), "black")
        sheet.paste(Image.fromarray(frame), (0, CAPTION_HEIGHT))
        draw = ImageDraw.Draw(sheet)
        state = clip.verdict if is_over else f"step {STEPS_PER_FRAME * i}"
        draw.text((8, 4), f"{title}: {state}", fill="white", font=font)
        words = textwrap.fill(clip.instruction, LINE_LENGTH)
        draw.multiline_text((8, 22), words, fill="#bbbbbb", font=font, spacing=2)
        images.append(np.asarray(sheet))
    return images
