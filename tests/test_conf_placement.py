"""Which actors share which GPU."""

import pytest

from apportion.conf.gpu_memory import GIB
from apportion.conf.placement import GpuUse, Tenant, gpu_lines, place
from apportion.platform.cuda import Gpu

H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, (9, 0))


def laid_out(nodes, gpus, **shares):
    """Roles on each kind of GPU, from count and GPUs of each actor by role."""
    tenants = [Tenant(role, count, each, {}) for role, (count, each) in shares.items()]
    uses = place(tenants, nodes, gpus)
    return uses if uses is None else [(use.count, "+".join(t.role for t in use.tenants)) for use in uses]


@pytest.mark.parametrize(
    ("machine", "shares", "expected"),
    [
        ((1, 1), {"policy": (1, 0.5), "rollout": (1, 0.5)}, [(1, "policy+rollout")]),
        ((1, 1), {"policy": (1, 0.5), "rollout": (1, 0.25), "critic": (1, 0.25)}, [(1, "policy+rollout+critic")]),
        ((1, 8), {"policy": (4, 1), "rollout": (4, 1)}, [(4, "policy"), (4, "rollout")]),
        ((1, 8), {"policy": (4, 1), "rollout": (1, 4)}, [(4, "rollout"), (4, "policy")]),
        ((2, 8), {"policy": (8, 1), "rollout": (4, 2)}, [(8, "rollout"), (8, "policy")]),
        ((2, 8), {"rollout": (1, 8), "policy": (8, 1)}, [(8, "rollout"), (8, "policy")]),
        ((1, 3), {"policy": (2, 1), "judge": (1, 0.3), "reference": (2, 0.3)}, [(2, "policy"), (1, "judge+reference+reference")]),
        ((1, 2), {"policy": (1, 1), "judge": (1, 0.6), "reference": (1, 0.6)}, None),
        ((2, 4), {"rollout": (2, 3), "judge": (1, 2)}, None),  # two GPUs are left, on two nodes
        ((1, 8), {"policy": (9, 1)}, None),
    ],
)  # fmt: skip
def test_whole_gpus_are_exclusive_parts_are_packed_and_an_actor_is_on_one_node(machine, shares, expected):
    assert laid_out(*machine, **shares) == expected


def test_a_gpu_holds_the_larger_of_start_and_training():
    memory = {"weights": 10 * GIB, "activations": 5 * GIB}
    trained, starting = Tenant("policy", 1, 1, memory), Tenant("policy", 1, 1, memory, start=20 * GIB)
    assert (trained.bytes, trained.firm_bytes) == (15 * GIB, 10 * GIB)
    assert (starting.bytes, starting.firm_bytes) == (20 * GIB, 20 * GIB)
    use = GpuUse(1, (trained, Tenant("rollout", 1, 0.5, {"cache": 3 * GIB})), H100)
    assert (use.bytes, use.firm_bytes) == (18 * GIB, 13 * GIB)


def test_the_section_says_what_shares_a_gpu_and_what_is_left():
    policy = Tenant("policy", 4, 1, {"weights": 10 * GIB, "logits": GIB // 2, "nothing": 0}, start=12 * GIB)
    unknown = Tenant("reward", 1, 1, {"context": GIB // 2}, known=False)
    assert gpu_lines([]) == []
    assert gpu_lines([GpuUse(4, (policy,), H100), GpuUse(1, (unknown,))]) == [
        "",
        "GPU memory",
        "  4 x NVIDIA H100 80GB HBM3 (80.0 GiB): 12.0 GiB, 68.0 GiB left",
        "    policy      10.5 GiB = weights 10.0 GiB + logits 512 MiB; 12.0 GiB while it starts, with the whole model",
        "  1 x GPU: 512 MiB",
        "    reward      512 MiB = context 512 MiB; the model's size is not known",
    ]
