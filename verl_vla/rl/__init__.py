"""GRPO without a framework: rollout, groups, advantage, loss."""
