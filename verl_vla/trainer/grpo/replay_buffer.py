"""Dynamic sampling at the border: drop groups that agree, refill exactly, stop at a cap."""

from __future__ import annotations

from typing import Any

import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from verl_vla.config.grpo import SamplingConfig
from verl_vla.rl.group_sampling import GroupFilter, GroupResult
from verl_vla.trainer.grpo.rows import RowKey, group_key, group_of


class GroupReplayBuffer(ReplayBuffer):
    """veRL's replay buffer with the rules of `verl_vla.rl.group_sampling.GroupFilter`.

    veRL's own filter refills twice as many groups as it drops, throws the surplus away and has
    no cap (``verl/trainer/ppo/v1/replay_buffer.py``, eviction matrix). Here the episode loop
    blocks, so every group that was asked for is finished when `sample` looks.
    """

    def sample(
        self, global_steps: int, partition_id: str, batch_size: int
    ) -> tuple[KVBatchMeta, dict[str, Any]]:
        """Return the rows of the groups to train on, in order of group, episode and policy step.

        Raises:
            StarvedError: no group of any round taught anything.
        """
        assert self.refill_fn is not None, "the trainer hands it over"
        # all that veRL hands to a custom sampler
        options = {str(name): value for name, value in self.sampler_kwargs.items()}
        group_filter = GroupFilter(config=SamplingConfig(**options))
        entered: set[str] = set()
        while True:
            self._sync_metadata_from_transfer_queue()
            fresh = self._finished_groups(partition_id, entered)
            # a refill adds keys beside those of the rounds before
            entered |= {group_key(group.group_id) for group in fresh}
            dropped = group_filter.add_round(fresh)
            # what is left in the partition is what the step trains on
            self._clear_groups(partition_id, {group_key(group) for group in dropped})
            if group_filter.num_to_refill == 0:
                break
            # blocks until the episodes of the next round are scored
            self.refill_fn(group_filter.num_to_refill)
        group_filter.check_not_starved()
        metrics = {
            "sampling/groups_played": len(group_filter.played),
            "sampling/groups_kept": len(group_filter.kept),
            "sampling/rounds": group_filter.num_rounds,
        }
        found = self.partitions[partition_id]
        # by number: as strings, g10 would come before g9
        rows = {key: found[key] for key in sorted(found, key=RowKey.parse)}
        kept = [group_key(group) for group in group_filter.kept]
        return self._materialize_batch(partition_id, kept, rows), metrics

    def _finished_groups(self, partition_id: str, entered: set[str]) -> list[GroupResult]:
        """Groups that ended since the last look, by their prompt's tag."""
        tags = tq.kv_list(partition_id)[partition_id]
        fresh = sorted(self.finished_keys[partition_id] - entered, key=group_of)
        return [
            GroupResult(
                group_id=group_of(key),
                task_id=tags[key]["task_id"],
                num_solved=tags[key]["num_solved"],
                num_failed=tags[key]["num_failed"],
                num_crashed=tags[key]["num_crashed"],
                score_spread=tags[key]["score_spread"],
            )
            for key in fresh
        ]
