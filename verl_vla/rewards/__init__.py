"""The interface of reward plug-ins, the code that loads one, and the code that calls it."""

from verl_vla.core.plugins import import_file
from verl_vla.rewards.base import (
    FeatureExtractor,
    Need,
    RewardResult,
    Rows,
    Split,
    StatelessReward,
    TrajectoryBatch,
    TrajectoryReward,
    VideoNeed,
    optional_video,
)
from verl_vla.rewards.features import (
    AdditiveTime,
    Floats,
    align,
    center_on_start,
    cosine,
    is_valid,
    last_rows,
    min_max_sigmoid,
    normalised_time,
)
from verl_vla.rewards.goal_progress import goal_progress, smallest_reach
from verl_vla.rewards.loading import REWARDS_FOLDER, load_reward
from verl_vla.rewards.progress_head import HeadConfig, ProgressHead
from verl_vla.rewards.reference_memory import Reference, ReferenceMemory
from verl_vla.rewards.reference_reward import ReferenceReward
from verl_vla.rewards.scoring import (
    complete,
    judge,
    learn,
    looks_at_images,
    make_batch,
    score,
    video_need,
)

__all__ = [
    "REWARDS_FOLDER",
    "AdditiveTime",
    "FeatureExtractor",
    "Floats",
    "HeadConfig",
    "Need",
    "ProgressHead",
    "Reference",
    "ReferenceMemory",
    "ReferenceReward",
    "RewardResult",
    "Rows",
    "Split",
    "StatelessReward",
    "TrajectoryBatch",
    "TrajectoryReward",
    "VideoNeed",
    "align",
    "center_on_start",
    "complete",
    "cosine",
    "goal_progress",
    "import_file",
    "is_valid",
    "judge",
    "last_rows",
    "learn",
    "load_reward",
    "looks_at_images",
    "make_batch",
    "min_max_sigmoid",
    "normalised_time",
    "optional_video",
    "score",
    "smallest_reach",
    "video_need",
]
