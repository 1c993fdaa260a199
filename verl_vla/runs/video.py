"""Videos of single episodes, rendered step by step.

The episode runs in its usual environment. After each step its snapshot is restored in a second
simulator, which renders a larger image; so rendering cannot change the episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from verl_vla.core.episode import Outcome, Start
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.policies.base import Policy

FRAMES_PER_S = 20
"""Frame rate: LIBERO's control rate, so a video runs at real speed."""

FRAME_SIZE = 384
"""Height and width of one image, pixels."""

CAPTION_HEIGHT = 44
HOLD_FRAMES = 20
"""Number of times that the last image is repeated: one second."""

Frames = list[npt.NDArray[np.uint8]]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoClip:
    """One recorded episode."""

    frames: Frames
    """Images [FRAME_SIZE, FRAME_SIZE, 3], one per step and one of the start."""
    outcome: Outcome
    num_steps: int
    instruction: str

    @property
    def verdict(self) -> str:
        """Outcome and length of the episode, in words."""
        how = "solved" if self.outcome is Outcome.SUCCESS else "not solved"
        return f"{how} after {self.num_steps} steps"


def record_video(policy: Policy, config: EnvConfig, start: Start) -> VideoClip:
    """Roll out one episode greedily and render every step of it.

    Args:
        policy: policy that acts, as in an evaluation.
        config: environment as in the evaluation; the video has a larger render size.
        start: the recorded start.
    """
    env = make_libero_env(config)
    camera = make_libero_env(replace(config, render_size=FRAME_SIZE))
    try:
        seen = env.reset(start.task_id, start.init_state_id)
        instruction = seen.instruction
        frames: Frames = []
        outcome: Outcome | None = None
        num_steps = 0

        def draw() -> None:
            camera.restore(env.snapshot())
            frames.append(camera.simulator(start.task_id).render(config.cameras[0]))

        draw()
        while outcome is None:
            noise = torch.zeros(1, policy.shape.num_tokens, dtype=torch.float64)
            for action in policy.act([seen], noise, temperature=0.0).actions[0]:
                result = env.step_chunk(action[None])
                num_steps += 1
                draw()
                outcome = result.outcome
                if result.observation is None:
                    break
                seen = result.observation
    finally:
        env.close()
        camera.close()
    return VideoClip(frames=frames, outcome=outcome, num_steps=num_steps, instruction=instruction)


def write_side_by_side(path: Path, clips: Sequence[tuple[str, VideoClip]]) -> None:
    """Write clips of the same start side by side, each under its caption."""
    length = max(len(clip.frames) for _, clip in clips) + HOLD_FRAMES
    columns = [_captioned(title, clip, length) for title, clip in clips]
    video = [np.concatenate(images, axis=1) for images in zip(*columns, strict=True)]
    imageio.imwrite(path, np.stack(video), fps=FRAMES_PER_S, codec="libx264", macro_block_size=4)


def _captioned(title: str, clip: VideoClip, length: int) -> Frames:
    font = ImageFont.load_default(size=15)
    images: Frames = []
    for i in range(length):
        frame = clip.frames[min(i, len(clip.frames) - 1)]
        is_over = i >= len(clip.frames) - 1
        sheet = Image.new("RGB", (FRAME_SIZE, FRAME_SIZE + CAPTION_HEIGHT), "black")
        sheet.paste(Image.fromarray(frame), (0, CAPTION_HEIGHT))
        draw = ImageDraw.Draw(sheet)
        state = clip.verdict if is_over else f"step {i}"
        draw.text((8, 4), f"{title}: {state}", fill="white", font=font)
        draw.text((8, 23), clip.instruction, fill="#bbbbbb", font=font)
        images.append(np.asarray(sheet))
    return images
