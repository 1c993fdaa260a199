"""A recipe in veRL's words: the only list of veRL's options that we set, each with its reason."""

from __future__ import annotations

import os
from pathlib import Path

import verl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_vla.core.errors import ConfigError
from verl_vla.trainer.checkpoint import UNFINISHED
from verl_vla.trainer.engine.weights import checkpoint_contents
from verl_vla.trainer.grpo.run import Run
from verl_vla.trainer.grpo.verl_overrides import Options, check_overrides
from verl_vla.trainer.verl_compat.process import (
    ADV_ESTIMATOR,
    MODEL_TYPE,
    ROLLOUT_NAME,
    choose_device,
)

PRECISION = {"float32": "fp32", "bfloat16": "bf16"}


def to_verl(run: Run) -> DictConfig:
    """veRL's configuration for ``run``, complete and resolved.

    Raises:
        ConfigError: the recipe's ``verl`` section names an option that veRL does not have.
    """
    folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    with initialize_config_dir(folder, version_base=None):
        config = compose("ppo_trainer")
    options = _algorithm(run) | _model(run) | _actor(run) | _rollout(run) | _run(run)
    for name, value in options.items():
        # force_add: veRL's YAML has no key for some, e.g. ``model.model_type``
        OmegaConf.update(config, name, value, force_add=True)
    check_overrides(run.recipe.verl, run.folder, options)
    # from here on a name that veRL does not know is refused
    OmegaConf.set_struct(config, True)
    try:
        config = OmegaConf.merge(config, run.recipe.verl)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"the recipe's verl section does not fit veRL {verl.__version__}: {error}"
        ) from error
    assert isinstance(config, DictConfig)
    OmegaConf.resolve(config)
    return config


def _algorithm(run: Run) -> Options:
    sampling = run.recipe.sampling
    return {
        "algorithm.adv_estimator": ADV_ESTIMATOR,
        # GRPO has the KL term in the loss (arXiv:2402.03300, equation 3)
        "algorithm.use_kl_in_reward": False,
        # Our replay buffer filters and refills; veRL's own filter has no cap.
        "algorithm.filter_groups.enable": False,
        # true: veRL copies `rollout_log_probs` to `old_log_probs` (``trainer_base.py``)
        "algorithm.rollout_correction.bypass_mode": not run.recipe.loss.recompute_log_probs,
        # the group's mean takes the place of a learned value
        "critic.enable": False,
        # scores come with the rows
        "reward.num_workers": 0,
        "trainer.v1.sampler.custom_sampler.path": "pkg://verl_vla.trainer.grpo.replay_buffer",
        "trainer.v1.sampler.custom_sampler.name": "GroupReplayBuffer",
        "trainer.v1.sampler.sampler_kwargs": {
            "groups_per_step": sampling.groups_per_step,
            "group_size": sampling.group_size,
            "temperature": sampling.temperature,
            "dynamic": sampling.dynamic,
            "filter_on": sampling.filter_on,
            "max_rounds": sampling.max_rounds,
        },
    }


def _model(run: Run) -> Options:
    policy = run.recipe.policy
    model = "actor_rollout_ref.model"
    return {
        f"{model}.path": str(run.policy_folder),
        f"{model}.model_type": MODEL_TYPE,
        # Importing it registers the engine and the model, in every process that reads this.
        f"{model}.external_lib": "verl_vla.trainer.engine.engine",
        f"{model}.trust_remote_code": False,
        # packing belongs to veRL's engine for language models
        f"{model}.use_remove_padding": False,
        f"{model}.enable_gradient_checkpointing": policy.gradient_checkpointing,
        f"{model}.override_config.attn_implementation": policy.attention,
        f"{model}.override_config.unnorm_key": run.processor.codec.statistics.key,
        f"{model}.override_config.quantization": policy.quantization,
        f"{model}.override_config.gather_once": run.recipe.cluster.gather_once,
        f"{model}.lora_rank": policy.lora_rank or 0,
        f"{model}.lora_alpha": policy.lora_alpha,
        f"{model}.target_modules": policy.lora_targets,
    }


def _actor(run: Run) -> Options:
    recipe, actor = run.recipe, "actor_rollout_ref.actor"
    # tokens for veRL, and rows for `VLAEngine.forward_backward_batch`
    budget = recipe.optimizer.micro_batch_size
    optim = f"{actor}.optim"
    has_adapters = recipe.policy.lora_rank is not None
    return {
        f"{actor}.strategy": "fsdp2",
        # Of veRL's KL machinery only the reference worker is used; the term is in our loss.
        f"{actor}.use_kl_loss": recipe.loss.kl.is_on,
        f"{actor}.use_torch_compile": False,
        # Micro-batches by a budget: rows need not divide, ranks run equally many.
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": budget,
        # veRL checks it against the batch size; `update` says how many mini-batches there are
        f"{actor}.ppo_mini_batch_size": recipe.sampling.groups_per_step,
        # veRL asserts that both are chosen alike (``workers/engine_workers.py``)
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": True,
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": budget,
        **_fsdp(f"{actor}.fsdp_config", run),
        # The reference policy computes as the learner does, so that they begin equal to the bit.
        **_fsdp("actor_rollout_ref.ref.fsdp_config", run),
        f"{actor}.checkpoint.save_contents": checkpoint_contents(has_adapters=has_adapters),
        f"{optim}.optimizer": recipe.optimizer.name,
        f"{optim}.lr": recipe.optimizer.lr,
        f"{optim}.lr_warmup_steps": recipe.optimizer.warmup_steps,
        f"{optim}.weight_decay": recipe.optimizer.weight_decay,
        f"{optim}.betas": list(recipe.optimizer.betas),
        f"{optim}.clip_grad": recipe.optimizer.clip_grad,
    }


def _fsdp(section: str, run: Run) -> Options:
    policy = run.recipe.policy
    precision = PRECISION[policy.dtype]
    return {
        f"{section}.strategy": "fsdp2",
        f"{section}.use_torch_compile": False,
        f"{section}.seed": run.recipe.seed,
        # What is trained stays float32 for the optimizer; FSDP casts it for the arithmetic.
        f"{section}.model_dtype": "fp32" if policy.lora_rank is None else precision,
        # DeepSpeed's optimizer steps on the host, so its weights stay there
        f"{section}.offload_policy": run.recipe.optimizer.name == "deepspeed_cpu_adam",
        f"{section}.mixed_precision": {
            "param_dtype": precision,
            # the gradients of many ranks are added up, and bfloat16 would drop the small ones
            "reduce_dtype": "fp32",
            "buffer_dtype": "fp32",
        },
    }


def _rollout(run: Run) -> Options:
    rollout = "actor_rollout_ref.rollout"
    return {
        f"{rollout}.name": ROLLOUT_NAME,
        f"{rollout}.n": run.recipe.sampling.group_size,
        f"{rollout}.temperature": run.recipe.sampling.temperature,
        # veRL's 2 are for its own servers; here every rank plays
        f"{rollout}.tensor_model_parallel_size": 1,
        # no server, so no cache to free
        f"{rollout}.free_cache_engine": False,
        # where they are computed again, veRL reports how far both differ
        f"{rollout}.calculate_log_probs": True,
        f"{rollout}.n_gpus_per_node": run.recipe.cluster.ranks_per_node,
        f"{rollout}.router_config_path": str(Path(__file__).parent / "no_router.yaml"),
    }


def _run(run: Run) -> Options:
    recipe = run.recipe
    groups, steps = recipe.sampling.groups_per_step, recipe.trainer.total_training_steps
    never = -1
    save, evaluate = recipe.trainer.save_every, recipe.trainer.eval_every
    return {
        "data.train_batch_size": groups,
        "data.val_batch_size": groups,
        "data.dataloader_num_workers": 0,
        "data.seed": recipe.seed,
        # veRL hands them to the data set, and `NoDataset` opens none
        "data.train_files": "unused",
        "data.val_files": "unused",
        "data.custom_cls.path": "pkg://verl_vla.trainer.verl_compat.placement",
        "data.custom_cls.name": "NoDataset",
        "transfer_queue.enable": True,
        # one a node with ranks, for which `require_room` counts a slot
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": recipe.cluster.num_nodes,
        # Not on nodes that only simulate, which are started with no CPU for Ray to give away.
        "transfer_queue.backend.SimpleStorage.required_node_resource": "CPU",
        "trainer.device": choose_device(recipe.cluster.device),
        "trainer.nnodes": recipe.cluster.num_nodes,
        "trainer.n_gpus_per_node": recipe.cluster.ranks_per_node,
        "trainer.logger": list(recipe.trainer.loggers),
        "trainer.project_name": recipe.trainer.project,
        "trainer.experiment_name": run.folder.name,
        "trainer.total_training_steps": steps,
        # one more than there are steps, so that veRL's loop ends by counting steps
        "trainer.total_epochs": steps + 1,
        "trainer.save_freq": save if save else never,
        "trainer.test_freq": evaluate if evaluate else never,
        "trainer.val_before_train": recipe.trainer.eval_before,
        # `checkpoint.writing` moves what is complete
        "trainer.default_local_dir": str(run.checkpoints / UNFINISHED),
    }
