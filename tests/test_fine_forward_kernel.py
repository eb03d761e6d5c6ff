"""The fine stage's forward kernel in the simulator, against the reference in float64."""

import pytest
import torch

import simulated
from attention_cases import EDGE_CASES, LINEAR, PAIRS, Case, linear, random_case
from fine_stage import check_forward, forward
from simulated import simulated_device
from tolerance import assert_lse_within_tolerance
from vsa_cuda import _extension, _kernels, reference
from vsa_cuda.geometry import CubeGrid

pytestmark = [
    pytest.mark.simulator,
    pytest.mark.skipif(
        not _extension.is_available(), reason="vsa_cuda._C is not built: no host plan to simulate"
    ),
]


@pytest.mark.parametrize("sms", [1, 3])  # with 3, some cases have tasks of one block
@pytest.mark.parametrize("case", EDGE_CASES, ids=str)
def test_fine_forward_equals_reference(case, sms, seed, monkeypatch):
    monkeypatch.setattr(simulated, "NUM_SMS", sms)
    out, _, lse = forward(case, seed)
    check_forward(case, out, lse)


@pytest.mark.parametrize("trial", range(6))
def test_random_shapes(trial, seed):
    case = random_case(trial, seed)
    out, _, lse = forward(case, seed)
    check_forward(case, out, lse)


@pytest.mark.parametrize("schedule", range(20))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_schedule_gives_the_same_bits(head_dim, schedule, seed):
    case = Case((4, 6, 13), head_dim=head_dim, topk=3, seed=seed)
    out, _, lse = forward(case, 1000 * seed + schedule)
    if schedule == 0:
        check_forward(case, out, lse)
    first, _, first_lse = first_schedule(head_dim, seed)
    assert torch.equal(out, first) and torch.equal(lse, first_lse)


_first = {}


def first_schedule(head_dim, seed):
    if head_dim not in _first:
        _first[head_dim] = forward(Case((4, 6, 13), head_dim=head_dim, topk=3, seed=seed), 7)
    return _first[head_dim]


def test_what_several_cubes_chose_is_loaded_once(seed, monkeypatch):
    """Lists {0..3, 4, 5} and {0..3, 6, 7} of one CTA: two blocks of queries, eight of keys and of values."""
    case = Case((1, 1, 128), cube=LINEAR, kv_shape=(1, 1, 64 * 8), kv_cube=LINEAR, topk=6, seed=seed)
    case.kv_indices[0, 0] = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7]])
    tensors = [x for x in case.fine_arguments if isinstance(x, torch.Tensor)]
    for sms, loads in ((1, 8), (3, 6 + 6)):  # in CTAs of their own, where there are enough
        monkeypatch.setattr(simulated, "NUM_SMS", sms)
        with simulated_device(*tensors, seed=seed) as device:
            _kernels.fine_forward(*case.fine_arguments)
        assert device.reports[-1].async_copies == 2 + 2 * loads


def test_lists_far_apart_do_not_deadlock(seed, monkeypatch):
    """One row holds the first and the last block, its neighbour all between: more than a ring has stages."""
    monkeypatch.setattr(simulated, "NUM_SMS", 1)
    case = Case((1, 1, 128), cube=LINEAR, kv_shape=(1, 1, 64 * 24), kv_cube=LINEAR, head_dim=64, topk=22)
    case.kv_indices[0, 0, 0, :2] = torch.tensor([0, 23])
    case.kv_indices[0, 0, 1] = torch.arange(1, 23)
    case.kv_num_blocks[0, 0] = torch.tensor([2, 22])
    out, _, lse = forward(case, seed)
    check_forward(case, out, lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_that_climb_past_thin_cubes(head_dim, dtype, seed, monkeypatch):
    """18 of 24 cubes, in stages of eight that come last."""
    monkeypatch.setattr(simulated, "NUM_SMS", 1)
    case = Case((5, 9, 13), heads=2, head_dim=head_dim, dtype=dtype, lists="dense", seed=seed)
    t, h, w = torch.meshgrid(torch.arange(2), torch.arange(3), torch.arange(4), indexing="ij")
    thin = ((t == 1) | (h == 2) | (w == 3)).flatten()
    assert int(thin.sum()) == 18
    nats = torch.where(thin, 100.0 * ((thin.cumsum(0) - 1) // 8) - 400, -500)
    case.query[..., 0] = 16
    case.key[..., 0] = (nats * head_dim**0.5 / 16).to(dtype)[case.kv_grid.cube_of_token(), None]
    out, _, lse = forward(case, seed)
    check_forward(case, out, lse)


# From twice as many columns: rows that are read 16 bytes at a time, and three that are not.
TENSOR_GATES = {
    "tensor": lambda x: x[..., : x.shape[3] // 2].contiguous(),
    "strided": lambda x: x[..., ::2],
    "unaligned": lambda x: x[..., 1 : 1 + x.shape[3] // 2],
    "expanded": lambda x: x[..., :1],
}


def check_epilogue(case, fine, coarse, seed, coarse_grid=None, with_lists=True):
    """Gates of these kinds, and O_c by the cubes of coarse_grid."""
    batch, tokens, heads, head_dim = case.query.shape
    cubes = (coarse_grid or case.q_grid).num_cubes
    pooled = case.randn(batch, heads, cubes, head_dim).to(case.dtype)

    def gate(kind, name):
        if kind in TENSOR_GATES:
            values = case.randn(batch, tokens, heads, 2 * head_dim).to(case.dtype)
            columns = TENSOR_GATES[kind](values)
            return {f"gate_{name}": columns.expand(-1, -1, -1, head_dim)}
        if kind == "scalar":
            return {f"gate_{name}": torch.tensor(0.75)}
        return {f"gate_{name}_value": 0.5} if kind == "float" else {}

    gates = gate(fine, "fine") | (gate(coarse, "coarse") if coarse else {"gate_coarse_value": 1.0})
    out, out_fine, lse = forward(case, seed, coarse_grid, with_lists, coarse=pooled, **gates)
    exact_fine, exact_lse = case.reference()
    assert_lse_within_tolerance(lse, exact_lse)

    def value(name):
        x = gates.get(f"gate_{name}", gates.get(f"gate_{name}_value"))
        return x.double() if isinstance(x, torch.Tensor) else x

    exact = reference.combine(
        exact_fine, pooled.double(), coarse_grid or case.q_grid, value("fine"), value("coarse")
    )
    bound = 4 * torch.finfo(case.dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= bound
    assert (out_fine.double() - exact_fine).abs().max() <= bound


@pytest.mark.parametrize("jump", [-40, 12, 45, 110, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_that_climb_from_block_to_block(head_dim, dtype, jump, seed):
    """By `jump` nats every two blocks: past what fp16 and then bf16 exponentials hold, and past fp32's."""
    case = Case(
        (1, 1, 128), cube=LINEAR, kv_shape=(1, 1, 64 * 7), kv_cube=LINEAR, head_dim=head_dim, dtype=dtype,
        lists="dense", seed=seed,
    )  # fmt: skip
    case.query[..., 0] = 16
    steps = torch.arange(64 * 7) // 128 - (3 if jump > 100 else 0)  # both signs: fp16 ends at 65504
    case.key[..., 0] = (steps * jump * head_dim**0.5 / 16).to(dtype)[None, :, None]
    out, _, lse = forward(case, seed)
    check_forward(case, out, lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("shape", "cube"), [((9, 3, 10), (4, 4, 4)), ((5, 6, 9), (8, 2, 4)), ((1, 1, 64 * 9), LINEAR)]
)
def test_scores_that_climb_past_pads(shape, cube, head_dim, dtype, seed):
    """Of both blocks of a stage, or only its first or second: by more than exponentials of fp32 hold.

    All are far below 0, what a slot without a token would score. The last of nine blocks has no partner.
    """
    case = Case(
        shape, cube, heads=3, head_dim=head_dim, dtype=dtype, layout="packed", lists="dense",
        ragged=cube == LINEAR, seed=seed,
    )  # fmt: skip
    block = torch.arange(9)
    stage = block // 2
    climbs = torch.stack([block >= 0, block % 2 == 0, block % 2 == 1])  # a head each
    nats = 100.0 * (stage * climbs - 5)
    case.query[..., 0] = 16
    case.key[..., 0] = (nats * head_dim**0.5 / 16).to(dtype)[:, case.kv_grid.cube_of_token()].T
    out, _, lse = forward(case, seed)
    check_forward(case, out, lse)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("fine", [None, "float", "scalar", *TENSOR_GATES])
@pytest.mark.parametrize("coarse", [None, "float", "scalar", *TENSOR_GATES])
def test_gates_in_the_epilogue(fine, coarse, head_dim, seed):
    case = Case((3, 5, 6), head_dim=head_dim, heads=2, topk=2, seed=seed)
    check_epilogue(case, fine, coarse, seed)


@pytest.mark.parametrize(("head_dim", "sms"), [(64, 3), (128, 3), (128, 16)])  # the last in pairs of CTAs
@pytest.mark.parametrize("gate", [None, "tensor", "strided"])
@pytest.mark.parametrize("video_shape", [(5, 7, 9), (4, 4, 8), (1, 1, 1)])
def test_all_blocks_of_the_linear_grid(video_shape, gate, head_dim, sms, seed, monkeypatch):
    """No lists; a token takes the coarse output of its cube of the video."""
    monkeypatch.setattr(simulated, "NUM_SMS", sms)
    coarse_grid = CubeGrid(video_shape)
    blocks = (1, 1, coarse_grid.num_tokens)
    case = Case(blocks, LINEAR, batch=2, heads=2, head_dim=head_dim, lists="dense", seed=seed)
    check_epilogue(case, gate, gate, seed, coarse_grid, with_lists=False)


def alone(case, monkeypatch):
    """out, lse by CTAs that have no partner."""
    monkeypatch.setattr(simulated, "NUM_SMS", 1)
    out, _, lse = forward(case, with_lists=False)
    return out, lse


def check_pairs(case, sms, seeds, monkeypatch):
    expected = alone(case, monkeypatch)
    check_forward(case, *expected)
    monkeypatch.setattr(simulated, "NUM_SMS", sms)
    kernels = []
    for seed in seeds:
        out, _, lse = forward(case, seed, with_lists=False, kernels=kernels)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert {kernel.split("_d128")[0] for kernel in kernels} == {"fine_forward_dense"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS.keys())
def test_pairs_of_ctas_give_the_same_bits(pairs, dtype, seed, monkeypatch):
    """Under each of the simulator's four kinds of schedules."""
    make, sms = pairs
    case = make(head_dim=128, dtype=dtype, seed=seed)
    check_pairs(case, sms, range(4 * seed, 4 * seed + 4), monkeypatch)


@pytest.mark.parametrize("schedule", range(4))
def test_pairs_of_ctas_over_long_runs(schedule, seed, monkeypatch):
    """66 stages a task, so that the barriers go round in each; CTAs without a block between others."""
    case = linear(13 * 64, 131 * 64 + 1, heads=3, head_dim=128, seed=seed)()
    check_pairs(case, 4, [4 * seed + schedule], monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("jump", [12, 300])
def test_pairs_of_ctas_compute_scores_again(jump, dtype, seed, monkeypatch):
    case = linear(3 * 64, 64 * 7 - 9, head_dim=128, dtype=dtype, seed=seed)()
    case.query[..., 0] = 16
    steps = torch.arange(64 * 7 - 9) // 128 - (3 if jump > 100 else 0)
    case.key[..., 0] = (steps * jump * 128**0.5 / 16).to(dtype)[None, :, None]
    check_pairs(case, 3, [seed, seed + 1], monkeypatch)


def test_coarse_cubes_of_another_shape(seed):
    case = Case((3, 9, 10), heads=2, topk=2, seed=seed)
    coarse_grid = CubeGrid((3, 9, 10), (1, 8, 8))
    check_epilogue(case, "scalar", "tensor", seed, coarse_grid)


def test_inference_stores_no_fine_output(seed):
    case = Case((3, 5, 6), topk=2, seed=seed)
    pooled = case.randn(1, 1, case.q_grid.num_cubes, 64).to(case.dtype)
    arguments = list(case.fine_arguments)
    arguments[7], arguments[-1] = pooled, False
    with simulated_device(*(x for x in arguments if isinstance(x, torch.Tensor)), seed=seed) as device:
        out, out_fine, _ = _kernels.fine_forward(*arguments)
    device.assert_written(out)
    assert out_fine.numel() == 0
