"""GRPO without a training framework: rollout, groups, advantage, loss."""
