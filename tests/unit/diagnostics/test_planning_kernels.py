"""``plan --kernels``: what an operator is said to cost, and what it adds up to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import LlamaConfig

from verl_vla.cli import arguments
from verl_vla.cli import plan as cli
from verl_vla.config.choices import GPUS
from verl_vla.config.compose import load_recipe
from verl_vla.core.errors import ConfigError
from verl_vla.diagnostics.planning import kernels as planning
from verl_vla.diagnostics.planning.kernels import (
    ADAM_8BIT_BYTES,
    BANDWIDTHS,
    CLIPPED,
    GATHERED,
    REDUCED,
    STEPPED,
    UNPACKED,
    Kernels,
    fusible_share,
    kernels_of,
    micro_batches,
)
from verl_vla.diagnostics.planning.memory import NF4_BYTES
from verl_vla.diagnostics.planning.operators import (
    ATTENTION,
    COPIES,
    ELEMENTWISE,
    NORMS,
    PRODUCTS,
    UNKNOWN,
    Call,
    Label,
    OperatorCounts,
)
from verl_vla.diagnostics.planning.plan import make_plan
from verl_vla.diagnostics.planning.trace import PROMPT_TOKENS, Adapters, SameConfig, trace_model
from verl_vla.diagnostics.planning.update_pass import (
    IMAGES,
    LANGUAGE,
    LOSS,
    REST,
    VISION,
    count_optimizer,
    count_pass,
)
from verl_vla.policies.openvla_oft import OpenVLAOFTConfig

WIDTH, DEPTH, HEADS, BLOCKS, SIDE, ROWS = 32, 2, 4, 3, 56, 4
PATCHES = (SIDE // 14) ** 2
TOWER = {
    "patch_size": 14,
    "hidden_size": WIDTH // 2,
    "depth": BLOCKS,
    "heads": HEADS,
    "mlp_size": 2 * WIDTH,
    "class_token": True,
    "registers": 4,
    "layer_scale": True,
    "attention_pool": True,
}
PREFIX = 1 + 4
TINY = OpenVLAOFTConfig(
    text_config=LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    ),
    vision_towers=[TOWER, TOWER | {"class_token": False, "registers": 0, "layer_scale": False}],
    image_sizes=[SIDE, SIDE],
)
ADAPTERS = Adapters(rank=2, alpha=4, targets="language_model")
SETTINGS = [
    # adapters, recomputed activations, autocast
    (None, False, False),
    (None, True, False),
    (ADAPTERS, True, False),
    (ADAPTERS, False, True),
]


def count(run: Callable[[], object]) -> dict[Call, int]:
    """Run something on fake tensors, made inside of it."""
    with FakeTensorMode(), OperatorCounts(REST) as counts:
        run()
    return dict(counts.calls)


def flops(calls: dict[Call, int], kernel: str = "") -> int:
    return sum(n * call.flops for call, n in calls.items() if call.kernel.startswith(kernel))


def test_a_matrix_product_has_its_formulas_flops_and_bytes() -> None:
    half = {"dtype": torch.bfloat16}
    found = count(lambda: torch.empty(6, 8, **half) @ torch.empty(8, 10, **half))
    product = Call(f"{PRODUCTS}, {REST}", "mm", 2 * 6 * 8 * 10, 2 * (6 * 8 + 8 * 10 + 6 * 10))
    assert found == {product: 1}


def test_attention_has_its_formulas_flops_and_bytes_forward_and_backward() -> None:
    batch, heads, tokens, dim = 2, 4, 16, 8

    def attend() -> None:
        q, k, v = (torch.empty(batch, heads, tokens, dim).requires_grad_() for _ in range(3))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        mixed.backward(torch.empty_like(mixed))

    products = 2 * batch * heads * tokens**2 * dim
    one, sums = 4 * batch * heads * tokens * dim, 4 * batch * heads * tokens
    found = [call for call in count(attend) if call.kernel == f"{ATTENTION}, {REST}"]
    # q, k, v and the output; in float32 the logarithm of the denominators
    assert [(call.flops, call.bytes) for call in found] == [
        (2 * products, 4 * one + sums),
        # the scores are computed again; the gradients of all four, and of q, k and v
        (5 * products, 5 * one + sums + 3 * one),
    ]


def change(function: Callable[[Tensor], object]) -> Callable[[], object]:
    """A function of a float32 tensor of 6 x 8."""
    return lambda: function(torch.empty(6, 8))


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (change(lambda x: x.t().unsqueeze(0)), {}),
        (change(torch.empty_like), {}),
        (change(lambda x: x + 1), {(ELEMENTWISE, "add"): 2 * 192}),
        (change(lambda x: x + x), {(ELEMENTWISE, "add"): 2 * 192}),
        (change(lambda x: x.mul_(2)), {(ELEMENTWISE, "mul_"): 2 * 192}),
        (change(lambda x: x.sum(0)), {(ELEMENTWISE, "sum"): 192 + 32}),
        (change(lambda x: x.zero_()), {(COPIES, "zero_"): 192}),
        (change(torch.zeros_like), {(COPIES, "zeros_like"): 192}),
        (change(lambda x: x.bfloat16()), {(COPIES, "_to_copy"): 192 + 96}),
        (change(lambda x: x.copy_(x[:1].expand(6, 8))), {(COPIES, "copy_"): 192 + 32}),
        (change(lambda x: torch.cat([x, x])), {(COPIES, "cat"): 192 + 384}),
        # two of six rows, and two numbers of eight bytes
        (
            change(lambda x: functional.embedding(torch.empty(2, dtype=torch.int64), x)),
            {(COPIES, "embedding"): 64 + 16 + 64},
        ),
        (
            change(lambda x: torch._foreach_add_([x, x[:1]], 1)),
            {(ELEMENTWISE, "_foreach_add_"): 448},
        ),
    ],
)
def test_a_kernel_reads_its_inputs_once_and_writes_its_outputs_once(run, expected) -> None:
    assert {(call.kernel, call.operator): call.bytes for call in count(run)} == expected


@torch.library.custom_op("verl_vla_test::unheard_of", mutates_args=())
def unheard_of(x: Tensor) -> Tensor:
    return x.clone()


@unheard_of.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_that_no_rule_names_is_counted_and_said_to_be_unknown() -> None:
    (call,) = count(lambda: unheard_of(torch.empty(6, 8)))
    assert call == Call(UNKNOWN, "unheard_of", 0, 2 * 192)


def test_backward_operators_belong_to_the_part_that_ran_forward() -> None:
    with FakeTensorMode(), OperatorCounts(REST) as counts:
        x = torch.empty(4, 4).requires_grad_()
        with counts.label(Label("outer")):
            x = x @ x
            with counts.label(Label("inner", NORMS)):
                x = (x * 2) @ x
            x = x @ x
        (x @ x).sum().backward()
    found: dict[str, int] = {}
    for call, number in counts.calls.items():
        found[call.kernel] = found.setdefault(call.kernel, 0) + number
    # a product forward, and one for each factor backward
    assert [found[f"{PRODUCTS}, {part}"] for part in ("outer", "inner", REST)] == [6, 3, 3]
    assert found[NORMS] >= 2


@pytest.mark.parametrize(("adapters", "checkpointing", "autocast"), SETTINGS)
def test_the_classes_of_an_update_add_up_to_its_trace(adapters, checkpointing, autocast) -> None:
    dtype = torch.bfloat16
    calls = dict(count_pass(SameConfig(TINY), dtype, ROWS, adapters, checkpointing, autocast).calls)
    trace = trace_model(
        TINY,
        dtype=dtype,
        adapters=adapters,
        checkpointing=checkpointing,
        autocast=autocast,
        batch=ROWS,
    )
    # of which attention is no part
    assert flops(calls) - flops(calls, ATTENTION) == ROWS * trace.training_flops
    classes = {call.kernel for call in calls}
    parts = [f"{kind}, {part}" for kind in (PRODUCTS, ATTENTION) for part in (LANGUAGE, VISION)]
    others = [f"{PRODUCTS}, {REST}", NORMS, ELEMENTWISE, COPIES, IMAGES, LOSS]
    assert classes == {*parts, *others}, "every operator of the model has a class"
    # attention over BOS, patches, the prompt, action slots and the stop
    tokens = PATCHES + PROMPT_TOKENS + TINY.num_action_tokens + 1
    # 2 products forward, again where computed again, and 5 backward
    passes = 2 * (1 + checkpointing) + 5
    assert flops(calls, f"{ATTENTION}, {LANGUAGE}") == passes * 2 * ROWS * tokens**2 * WIDTH * DEPTH
    # frozen towers run forward only
    passes = passes if adapters is None else 2
    squares = (PATCHES + PREFIX) ** 2 + PATCHES**2
    assert flops(calls, f"{ATTENTION}, {VISION}") == (
        passes * 2 * ROWS * squares * (WIDTH // 2) * (BLOCKS - 1)
    )


def test_prompts_of_a_micro_batch_make_a_mask() -> None:
    calls = count_pass(SameConfig(TINY), torch.bfloat16, ROWS, None, False, False).calls
    tokens = PATCHES + PROMPT_TOKENS + TINY.num_action_tokens + 1
    # queries, keys, values, output and denominators, and the mask of every row
    plain = ROWS * tokens * (4 * WIDTH * 2 + 4 * HEADS)
    (forward,) = [
        call
        for call in calls
        if call.kernel == f"{ATTENTION}, {LANGUAGE}" and "backward" not in call.operator
    ]
    assert forward.bytes == plain + ROWS * tokens**2 * 2


def test_adam_reads_and_writes_a_weight_in_eight_kernels_by_default() -> None:
    shapes = (torch.Size([1000, 100]), torch.Size([50]))
    numel = 100_050
    clipped, stepped = count_optimizer(shapes)
    norm_and_scale = 3 * 4
    assert moved(clipped) == pytest.approx(norm_and_scale * numel, rel=1e-3)
    assert moved(stepped) == pytest.approx(80 * numel, rel=1e-3)


def moved(calls: dict[Call, int]) -> int:
    return sum(number * call.bytes for call, number in calls.items())


def listed(*words: str, gpu: str = "a100-80") -> dict[str, Kernels]:
    plan = make_plan(load_recipe(["recipe=libero", *words]), TINY, GPUS[gpu])
    return {kernels.name: kernels for kernels in kernels_of(plan, TINY)}


def test_fsdp_moves_what_the_real_one_moves() -> None:
    """Two micro-batches of the real model under FSDP2, on one of two ranks and on one of one."""
    program = Path(__file__).with_name("one_sharded_update.py")
    cases = ((2, False), (2, True), (1, True))
    pairs = [f"{ranks},{int(adapters)}" for ranks, adapters in cases]
    done = subprocess.run(
        [sys.executable, str(program), TINY.to_json_string(), *pairs],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-len(cases) :]
    for (ranks, adapters), line in zip(cases, lines, strict=True):
        measured = json.loads(line)
        rank = ["policy.lora_rank=2", "policy.lora_alpha=4"] if adapters else []
        plan = make_plan(
            load_recipe(["recipe=libero", f"cluster.ranks_per_node={ranks}", *rank]),
            TINY,
            GPUS["a100-80"],
        )
        found = planning._Sums(GPUS["a100-80"])
        counted = count_pass(
            SameConfig(TINY),
            torch.bfloat16,
            ROWS,
            planning.adapters_of(plan.recipe.policy),
            False,
            False,
        )
        for unit in counted.units:
            planning._add_sharding(found, unit, plan.recipe, 2)
        sums = {part.name: part for part in found.kernels()}
        # shards of small tensors are padded
        for name in (GATHERED, REDUCED):
            assert sums[name].bytes == pytest.approx(measured[name][0], rel=0.02), (ranks, name)
            assert sums[name].link_bytes == pytest.approx(measured[name][1], rel=0.03), name


def test_what_is_counted_follows_the_recipe() -> None:
    full = listed("profile=8gpu")
    assert {GATHERED, REDUCED, CLIPPED, STEPPED} < set(full)
    assert full[GATHERED].link_bytes > 0
    lora = listed("profile=lora_24gb", gpu="a10g")
    assert lora[GATHERED].link_bytes == 0 < lora[GATHERED].bytes
    in_4_bits = listed("profile=qlora_24gb", gpu="a10g")
    assert not {GATHERED, REDUCED} & set(in_4_bits)
    plan = make_plan(load_recipe(["recipe=libero", "profile=qlora_24gb"]), TINY, GPUS["a10g"])
    under, trained = plan.trace.under_adapters, plan.trace.trained
    times = micro_batches(plan)
    assert times == 8 * 8 * 64 / 4
    assert in_4_bits[UNPACKED].bytes == pytest.approx(2 * times * (NF4_BYTES + 2) * under)
    assert in_4_bits[STEPPED].bytes == pytest.approx(ADAM_8BIT_BYTES * trained)
    again = listed("profile=qlora_24gb", "policy.gradient_checkpointing=true", gpu="a10g")
    assert again[UNPACKED].bytes == pytest.approx(1.5 * in_4_bits[UNPACKED].bytes)
    offloaded = listed("profile=8gpu", "optimizer.name=deepspeed_cpu_adam")
    assert not {CLIPPED, STEPPED} & set(offloaded)


def test_seconds_are_those_of_the_slower_of_products_and_memory() -> None:
    sums = planning._Sums(GPUS["a100-80"])
    sums.add("kernel", 312e12, 1, times=2)
    sums.add("kernel", 1, 2_039e9)
    sums.add("collective", 0, 0, 300e9)
    one, other = sums.kernels()
    assert (one.seconds, other.seconds) == (pytest.approx(3), pytest.approx(1))
    assert fusible_share([one, other]) == 0


def test_every_gpu_has_bandwidths() -> None:
    assert set(BANDWIDTHS) == {gpu.name for gpu in GPUS.values()}


WORDS = ["recipe=libero", "policy.path=bases/mini", "profile=two_cores", "cluster.device=cuda"]


def test_the_command_prints_the_kernels_and_lists_them_for_programs(capsys) -> None:
    words = [*WORDS, "--gpu", "a100-80", "--kernels"]
    assert cli.run(arguments.parse("plan", words)) == 0
    said = capsys.readouterr().out
    assert "kernels of an optimizer step of a rank: 512 micro-batches of 16 rows\n" in said
    (head,) = [line for line in said.splitlines() if "GB received" in line]
    assert head.split() == ["TFLOP", "GB", "moved", "GB", "received", "seconds", "share"]
    for name in (f"{PRODUCTS}, {LANGUAGE}", f"{ATTENTION}, {VISION}", NORMS, LOSS, STEPPED):
        assert f"\n{name} " in said
    assert "not measured, as if nothing overlapped" in said
    assert "attention of the language model: the memory-efficient kernel where" in said
    assert cli.run(arguments.parse("plan", [*words, "--json"])) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is True
    assert {kernels["name"] for kernels in told["kernels"]} >= {NORMS, LOSS, STEPPED}
    shares = [line.split()[-1] for line in said.splitlines() if line.endswith("%")]
    assert sum(float(share[:-1]) for share in shares[:-1]) == pytest.approx(100, abs=1)
    assert cli.run(arguments.parse("plan", [*WORDS, "--gpu", "a100-80", "--json"])) == 0
    assert "kernels" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("attention", "gpu", "path"),
    [
        ("sdpa", "a10g", "memory-efficient"),
        ("sdpa", "h200", "cuDNN"),
        ("flash_attention_2", "h200", "flash-attn"),
        ("eager", "a10g", "softmax"),
    ],
)
def test_the_kernel_of_attention_is_named(attention: str, gpu: str, path: str) -> None:
    recipe = load_recipe(["recipe=libero", f"policy.attention={attention}"])
    assert path in planning.attention_path(make_plan(recipe, TINY, GPUS[gpu]))


def test_kernels_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match="--kernels needs the speeds of a GPU"):
        cli.run(arguments.parse("plan", ["recipe=quickstart", "--kernels"]))
