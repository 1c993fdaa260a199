"""GRPO under veRL's synchronous trainer.

The loop is veRL's ``PPOTrainer.fit``; `VLATrainer` answers its hooks. One training step:

    train               save_check, once              can this run save, and resume?
    on_step_begin       forget the groups of the last step
    _next_train_batch   EpisodeLoop.next_groups           choose n init states, one a group
    generate_sequences  EpisodeLoop.generate_sequences    play, score and store the groups:
                          rl.rollout.rollout                G episodes of every init state
                            Policy.act                        images -> action tokens, all ranks
                            EnvPool.step                      action chunks -> images
                            RowWriter.add                     a row a policy step, TransferQueue
                          rewards.scoring.score             a score for every episode
                            ClusterEncoder                    images -> features, all ranks
    sample              GroupReplayBuffer.sample          drop groups that agree, ask for as many
                                                          more, for sampling.max_rounds rounds
    advantage           rl.advantage.group_advantage      score less the group's mean, over std
    _update_actor       update.update                     PPO ratio, clipped to 0.8 .. 1.28
                          mini_batches.cut                  whole groups, equally many in each
                          VLAEngine, rl.loss.policy_loss
    _validate           evaluation.evaluate.evaluate      every trainer.eval_every steps
    _compute_metrics    RunRecorder.add_step              metrics, then the checkpoint
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu

from verl_vla.core.errors import RewardError, SolvedError
from verl_vla.core.signals import StopRequest
from verl_vla.envs.registry import suite
from verl_vla.evaluation import cold_start
from verl_vla.evaluation.during_training import EvaluationKind
from verl_vla.evaluation.evaluate import evaluate
from verl_vla.rewards.encoders.base import track_batches
from verl_vla.rl.group_sampling import StartSampler
from verl_vla.rl.rollout import Simulators
from verl_vla.rl.setup import most_policy_steps
from verl_vla.runs.console import episodes_bar
from verl_vla.runs.disk_space import most_checkpoints
from verl_vla.runs.run_dir import keep_solved
from verl_vla.runs.terminal import track_encoding
from verl_vla.trainer import checkpoint
from verl_vla.trainer.grpo.advantage import tag_advantages
from verl_vla.trainer.grpo.cluster_encoder import place_encoders
from verl_vla.trainer.grpo.cluster_policy import ClusterPolicy
from verl_vla.trainer.grpo.env_loop import EpisodeLoop
from verl_vla.trainer.grpo.run import Run
from verl_vla.trainer.grpo.save_check import check_save
from verl_vla.trainer.grpo.unscored_episodes import UnscoredEpisodes
from verl_vla.trainer.grpo.update import update
from verl_vla.trainer.grpo.worker import VLAWorker, memory_metrics
from verl_vla.trainer.verl_compat.placement import RankPoolManager

logger = logging.getLogger(__name__)


class VLATrainer(PPOTrainerSync):
    """Groups of episodes instead of prompts, policy steps instead of sequences."""

    def __init__(self, config: Any, run: Run, simulators: Simulators, stop: StopRequest) -> None:
        super().__init__(config)
        self.run = run
        self.recipe = run.recipe
        self.simulators = simulators
        self.stop = stop
        self.recorder = run.open_recorder()
        self._resumed_state: dict[str, Any] | None = None
        self._step_began_with: dict[str, Any] = {}
        self._greedy_before: cold_start.Rates | None = None
        self._evaluation_s = 0.0
        self._checkpoint_s = 0.0
        self._save_is_due = False
        self._last_saved = 0

    def init(self) -> None:
        """Start the workers, load the newest valid checkpoint, and make the episode loop."""
        # starts the ranks and calls `_load_checkpoint`, which sets what the rest reads
        super().init()
        recipe, cluster = self.recipe, self.recipe.cluster
        env, chosen = recipe.environment, suite(recipe.environment.suite)
        track_batches(self.run.reward, track_encoding)
        place_encoders(self.run.reward, self.actor_rollout_wg, num_ranks=cluster.num_ranks)
        self.policy = ClusterPolicy(
            self.actor_rollout_wg,
            self.run.processor,
            num_ranks=cluster.num_ranks,
        )
        self.loop = EpisodeLoop(
            self.policy,
            self.simulators,
            self.run.reward,
            StartSampler(
                self.run.training_starts, seed=recipe.seed, group_size=recipe.sampling.group_size
            ),
            suite=env.suite,
            mirrored=chosen.images_are_mirrored,
            temperature=recipe.sampling.temperature,
            seed=recipe.seed,
            reward_timeout_s=recipe.reward_timeout_s,
            recorder=self.recorder,
            unscored=UnscoredEpisodes(self.run.folder, first_step=self.global_steps + 1),
            most_policy_steps=most_policy_steps(env, chosen, self.run.processor.shape.chunk_length),
        )
        if self._resumed_state is not None:
            self.loop.load_state_dict(self._resumed_state)
        # veRL has set its own loss by now
        self.actor_rollout_wg.set_policy_loss(recipe.loss, self.run.processor.shape.action_dim)
        self.actor_rollout_wg.guard_updates(
            str(self.run.folder / "diverged"), recipe.optimizer.max_skipped_in_a_row
        )
        # the evaluation before training belongs to step 0; veRL would repeat it with each start
        if self.global_steps > 0:
            self.config.trainer.val_before_train = False
        # -1: a run without a checkpoint also drops the evaluation of step 0
        self.recorder.rewind(self.global_steps if self.global_steps else -1)

    def train(self) -> None:
        """Run veRL's loop to the last step, or until no episode fails any more.

        Raises:
            SolvedError: nothing failed in the very first step, so nothing was learned.
            RewardError: the reward was refused. The steps before are saved and the episodes of
                this one are kept, so that the same command resumes with a corrected reward.
            ConfigError: `trainer.check_save` found that this run cannot save, or resume.
            RayActorError: a rank died.
        """
        # a run that is resumed has saved before
        if self.recipe.trainer.check_save and self.global_steps == 0:
            self._check_save()
        try:
            self.fit(self.loop)  # pyright: ignore[reportArgumentType] -- needs generate_sequences only
        except SolvedError:
            if self.global_steps == 1:
                raise
            self._end_solved()
        except RewardError as error:
            # a rank that died while it encoded, which no other reward would mend
            if isinstance(error.__cause__, RayActorError | OutOfMemoryError):
                raise error.__cause__ from None
            step = self.global_steps
            saved = self._save_steps_before(step)
            raise RewardError(
                f"{error}. {saved}; the episodes of step {step} are kept. Start the same command "
                "again with a corrected reward"
            ) from error

    def _end_solved(self) -> None:
        """End a run as its last step would have: saved, and evaluated once."""
        step, wanted = self.global_steps, self.recipe.trainer.total_training_steps
        saved = self._save_steps_before(step)
        # the step was begun, but no update was made
        self.global_steps = step - 1
        logger.info("every episode of step %d of %d was solved. %s", step, wanted, saved)
        if self.recipe.trainer.eval_every and not self.run.was_evaluated(self.global_steps):
            values = self._validate()
            self.recorder.add_to_last_step(values | {"timing_s/testing": self._evaluation_s})
        keep_solved(self.run.folder, self.global_steps)

    def on_train_begin(self) -> None:
        """Before the first update of a run, after its evaluation, make the cold-start check.

        Raises:
            ColdStartError: the policy succeeds too seldom to be trained.
        """
        super().on_train_begin()
        config, folder = self.recipe.cold_start, self.run.folder
        # veRL has counted on already: 1 is the first step of the run
        is_first = self.global_steps == 1
        if config.mode == "off" or not is_first or cold_start.was_passed(folder):
            return
        found = cold_start.probe(
            self.run.training_starts,
            self.policy,
            self.simulators,
            config=config,
            temperature=self.recipe.sampling.temperature,
            seed=self.recipe.seed,
            greedy=self._greedy_before,
        )
        cold_start.keep(folder, found.as_json(config, self.run.task_names))
        found.require(config.threshold, self.run.task_names)
        logger.info("cold-start check: %s", found.summary())

    def on_step_begin(self) -> None:
        """Forget the groups of the last step.

        Raises:
            Interrupted: somebody asked for the end, and all that was learned is kept.
        """
        # only when the last step is saved, which `_compute_metrics` does once an end is asked for
        if self.stop.is_made and self._last_saved == self.global_steps - 1:
            self.stop.carry_out(self._last_saved)
        self.loop.begin_step()
        # before anything is sampled, for `_save_steps_before`
        self._step_began_with = self.loop.state_dict()

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        # the roles of veRL that hold the policy
        played = (Role.ActorRollout, Role.ActorRolloutRef)
        self.role_worker_mapping = {
            role: ray.remote(VLAWorker) if role in played else worker
            for role, worker in self.role_worker_mapping.items()
        }
        self.resource_pool_manager = RankPoolManager(
            resource_pool_spec=self.resource_pool_manager.resource_pool_spec,
            mapping=self.mapping,
            use_gpu=self.config.trainer.device != "cpu",
        )

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        wanted = self.recipe.sampling.groups_per_step if num_prompts is None else num_prompts
        batch = tu.get_tensordict({"uid": self.loop.next_groups(wanted)})
        tu.assign_non_tensor_data(batch, "global_steps", self.global_steps)
        return batch

    def _balance_batch(
        self,
        batch: KVBatchMeta,
        metrics: dict[str, Any],
        logging_prefix: str = "",
        keep_minibatch: bool = False,
    ) -> KVBatchMeta:
        # `update` pads and orders its mini-batches itself. veRL's partition of the whole batch
        # would be thrown away, and takes 12 s for the 32,768 rows of a full round
        return upsample_batch_to_divisible_size(
            batch, self.recipe.cluster.num_ranks, self.tokenizer.eos_token_id
        )

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        # veRL would fetch the rollout's log-probs and store them again; `make_rows` stores both
        if not self.recipe.loss.recompute_log_probs:
            return batch
        return super()._compute_old_log_prob(batch, metrics)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        return tag_advantages(batch, self.config.algorithm)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch, values = update(
            batch, self.actor_rollout_wg, self.recipe, self.tokenizer.eos_token_id
        )
        metrics.update(values)
        return batch

    def _validate(self) -> dict[str, float]:
        """Make every kind of evaluation; what a kill cut short is made again as a whole."""
        began = time.perf_counter()
        values: dict[str, float] = {}
        for kind in self.run.evaluation_kinds:
            values |= self._evaluate(kind)
        self._evaluation_s = time.perf_counter() - began
        # there is no line of metrics yet that it could join
        if self.global_steps == 0:
            self.recorder.add_first_evaluation(values | {"timing_s/testing": self._evaluation_s})
        return values

    def _evaluate(self, kind: EvaluationKind) -> dict[str, float]:
        with episodes_bar("evaluation", len(self.run.evaluation_starts)) as ended:
            result = evaluate(
                self.run.evaluation_starts,
                self.policy,
                self.simulators,
                temperature=kind.temperature,
                seed=self.recipe.seed,
                ended=ended,
            )
        self.recorder.show_evaluation(self.global_steps, result.total, kind.label)
        self.run.keep_evaluation(self.global_steps, kind, result)
        # the cold-start check need not play greedy episodes again
        if self.global_steps == 0 and kind.temperature == 0:
            self._greedy_before = cold_start.Rates.of(result, self.recipe.evaluation.states)
        return result.as_metrics(self.run.task_names, kind.suffix)

    def _compute_metrics(
        self,
        batch: KVBatchMeta,
        metrics: dict[str, Any],
        timing_raw: dict[str, float],
        global_steps: int,
        epoch: int,
    ) -> None:
        """Replace what veRL collected by the declared metrics of the step, and report them."""
        declared = ("sampling/", "actor/", "val/")
        values = {k: float(v) for k, v in metrics.items() if k.startswith(declared)}
        values |= self.loop.stats.as_metrics()
        values |= memory_metrics(self.actor_rollout_wg.peak_memory())
        parts = {"old_log_prob", "ref", "adv", "update_actor"}
        values |= {
            "timing_s/step": timing_raw["step"],
            "timing_s/update": sum(timing_raw[part] for part in parts & timing_raw.keys()),
            "timing_s/save_checkpoint": self._checkpoint_s,
        }
        if "testing" in timing_raw:
            values["timing_s/testing"] = self._evaluation_s
        # in place: veRL logs this very dictionary after the hook
        metrics.clear()
        metrics.update(values)
        self.recorder.add_step(global_steps, values)
        if self._save_is_due or self.stop.is_made:
            self._write_checkpoint(self.loop.state_dict())
        self.recorder.refresh_report()

    def _save_checkpoint(self) -> None:
        """Only note it: veRL saves before it evaluates and reports.

        Saving last, a checkpoint of step N means that the metrics of step N are on disk.
        """
        self._save_is_due = True

    def _save_steps_before(self, step: int) -> str:
        """Write the checkpoint that ``step``, cut short before its update, began from.

        Returns:
            What became of the steps before.
        """
        last = step - 1
        if last == 0 or last in checkpoint.complete_steps(self.run.checkpoints):
            return "No training step is lost"
        if not self.recipe.trainer.save_every:
            return "The training steps before are lost, since trainer.save_every is 0"
        # veRL names the folder after it
        self.global_steps = last
        self._write_checkpoint(self._step_began_with)
        return f"Training step {last} was saved"

    def _write_checkpoint(self, state: dict[str, Any]) -> None:
        began = time.perf_counter()
        with checkpoint.writing(self.run.checkpoints, self.global_steps) as folder:
            self._fill_checkpoint(folder, state)
        checkpoint.remove_old(self.run.checkpoints, self.recipe.trainer.keep_checkpoints)
        self._save_is_due, self._last_saved = False, self.global_steps
        self._checkpoint_s = time.perf_counter() - began

    def _fill_checkpoint(self, folder: Path, state: dict[str, Any]) -> None:
        super()._save_checkpoint()  # to that folder, see `to_verl`
        self.actor_rollout_wg.export_policy(str(folder / "policy"))
        checkpoint.save_run_state(folder, state)

    def _check_save(self) -> None:
        """Write, read and remove a checkpoint as large as those of this run; nothing changes."""
        ranks = self.actor_rollout_wg

        def save(folder: Path) -> None:
            # the optimizer has no state yet, which is the larger part of a rank's files
            ranks.make_optimizer_state()
            self._fill_checkpoint(folder, self.loop.state_dict())
            # a rank that resumes has none either before it reads it
            ranks.drop_optimizer_state()

        def load(folder: Path) -> None:
            self.loop.load_state_dict(self._read_checkpoint(folder))
            ranks.drop_optimizer_state()

        # veRL's data loader draws a number when it is asked for its state
        with torch.random.fork_rng(devices=[]):
            check_save(
                self.run.checkpoints,
                save=save,
                load=load,
                disk=self.run.disk,
                most_checkpoints=most_checkpoints(self.recipe),
            )
        # a peak counts from the last time that it was asked for
        ranks.peak_memory()

    def _load_checkpoint(self) -> None:
        step = checkpoint.newest_valid(self.run.checkpoints)
        if step is None:
            # veRL would search its own folder, which holds what is unfinished
            self.config.trainer.resume_mode = "disable"
            super()._load_checkpoint()
            return
        folder = checkpoint.step_folder(self.run.checkpoints, step)
        self._resumed_state = self._read_checkpoint(folder)
        self._last_saved = step
        logger.info("resumed after training step %d", self.global_steps)

    def _read_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Load what `_fill_checkpoint` wrote; return the state of the run."""
        # veRL reads the step from the folder's name
        self.config.trainer.resume_mode = "resume_path"
        self.config.trainer.resume_from_path = str(folder)
        super()._load_checkpoint()
        return checkpoint.load_run_state(folder)
