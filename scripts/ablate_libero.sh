#!/usr/bin/env bash
# Makes rows of the table of ablations in docs/experiments/libero.md, from the base that
# reproduce_libero.sh made: 6 training steps and an evaluation each. A second call goes on.
#   ablate_libero.sh FOLDER [NAME ...]     all, or those named; about 20 minutes of a core each
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
source "$(dirname "${BASH_SOURCE[0]}")/_libero.sh"
cd "$root"
out=${1:?name the folder that reproduce_libero.sh wrote}
shift
export OMP_NUM_THREADS=1
declare -A words=(
    [knn_align]="reward=knn_align reward_args.encoder=policy_towers reward_args.encoder_args.path=$out/policy"
    [srpo]="reward=srpo reward_args.encoder=policy_towers reward_args.encoder_args.path=$out/policy"
    [no_dynamic]="sampling.dynamic=false"
    [symmetric_clip]="loss.clip.high=0.2"
    [temperature_1.0]="sampling.temperature=1.0"
    [temperature_1.6]="sampling.temperature=1.6"
    [kl]="loss.kl.coefficient=0.01"
    [seed_1]="seed=1"
)
if [ $# = 0 ]; then set -- "${!words[@]}"; fi
for name in "$@"; do
    [ -n "${words[$name]-}" ] || stop "there is no ablation '$name'; there are: ${!words[*]}"
done
[ -e "$out/policy" ] || stop "$out/policy is missing; run scripts/reproduce_libero.sh $out first"
set_up_packages run
set_up_renderer
for name in "$@"; do
    read -ra changed <<<"${words[$name]}"
    "$python" -m verl_vla train recipe=quickstart_libero_spatial policy.path="$out/policy" out="$out/$name" cold_start.mode=off \
        trainer.eval_before=false trainer.eval_every=0 trainer.total_training_steps=6 "${changed[@]}"
    evaluate "$out/$name/checkpoints/latest/policy" "$out/sampled/$name"
done
