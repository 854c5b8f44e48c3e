"""The persistent frame kernel on the CPU: all threads of all its blocks, in the emulator of tests/emulator."""

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import frame_phases
import pytest
import torch
from emulated_frame import Model, config_of, run_frame
from emulated_kernels import SOURCES, LaunchFailed, build, unavailable

from s1kernels.backends.cuda import l2_halves
from s1kernels.backends.cuda.persistent_frame import FRAME, Kind, Phases

REASON = unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

HALVES = [torch.bfloat16, torch.float16]
SIZES = {
    "small": config_of(layers=1, fast_layers=1, codebooks=3, intermediate=1024, positions=1100),
    "deep": config_of(layers=2, fast_layers=4, codebooks=3, intermediate=3072, positions=1100),  # S1-mini's fast stack
    "long": config_of(layers=1, fast_layers=1, codebooks=3, intermediate=1024, positions=4200),
}
FAULTS = {  # a line of device/frame_projections.cuh; a variable of the environment takes the first such out
    "NO_RELEASE": "    each_unit(units, [&](const RingCursor& u) { barrier_arrive(s.empty + u.slot); });",
    "NO_BARRIER": "    sync_workers();",
}


@cache
def model(size, dtype, constrained):
    return Model(SIZES[size], dtype, constrained)


def build_with_faults(folder):
    shutil.copytree(SOURCES, folder / "cuda")
    path = folder / "cuda" / "device" / "frame_projections.cuh"
    for name, line in FAULTS.items():
        before, after = path.read_text().split(f"\n{line}\n", 1)
        path.write_text(f'{before}\nif (!getenv("{name}")) {line}\n{after}')
    return build(folder, HALVES[0], folder / "cuda")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Libraries by name, compiled one after the other while the tests run: a dtype's; what racecheck sees; faults."""
    folder = tmp_path_factory.mktemp("emulated")
    with ThreadPoolExecutor(1) as compiler:
        made = {dtype: compiler.submit(build, folder, dtype) for dtype in HALVES}
        made["racecheck"] = compiler.submit(build, folder, HALVES[0], racecheck=True)
        made["faults"] = compiler.submit(build_with_faults, tmp_path_factory.mktemp("faults"))
        yield lambda name: made[name].result()


@pytest.fixture(scope="module")
def small_frame(library):
    """A frame of the small model, run once. At 128 all rows of the head are sampled, else those that ids name."""
    return cache(
        lambda dtype, position, seed: run_frame(
            model("small", dtype, position != 128), library(dtype), position, seed=seed
        )
    )


def same_bits(a, b):
    return a.codes == b.codes and all(map(torch.equal, a.results(), b.results()))


@pytest.mark.parametrize(
    ("dtype", "position"),
    [*itertools.product(HALVES, [17, 500, 1030]), *((HALVES[0], p) for p in (0, 128, 240, 241, 576, 577))],
    ids=str,
)
def test_a_frame_is_right(small_frame, dtype, position):
    """Logits, keys and values no farther from float64 than 1.5 times plain torch; draws as its logits and torch's
    numbers say; the caches' other rows as they were."""
    assert small_frame(dtype, position, 1).faults() == []


@pytest.mark.parametrize(("dtype", "position"), [(HALVES[0], 500), (HALVES[0], 1030), (HALVES[1], 17)], ids=str)
def test_the_order_of_threads_changes_no_bit(small_frame, dtype, position):
    assert same_bits(small_frame(dtype, position, 1), small_frame(dtype, position, 2))


def test_a_share_of_the_past_that_the_ring_cannot_hold(library):
    """Nine units, with a block that has positions in two of them."""
    frames = [run_frame(model("long", HALVES[0], True), library(HALVES[0]), 4113, seed=seed) for seed in (1, 2)]
    assert frames[0].faults() == []
    assert same_bits(*frames)


@pytest.mark.parametrize(("name", "position"), [(HALVES[0], 1030), (HALVES[1], 17), ("racecheck", 17)], ids=str)
def test_packed_weights_change_no_bit(library, small_frame, name, position):
    """Twice, since blocks take numbers and give them back."""
    dtype = HALVES[0] if name == "racecheck" else name
    frame = run_frame(model("small", dtype, True), library(name), position, seed=3, times=2, packed=True)
    assert same_bits(frame, small_frame(dtype, position, 1))


@pytest.mark.parametrize("position", [128, 500, 1030])
def test_every_phase_of_many_layers_passes_on_what_it_should(library, position):
    """Both stacks' shapes, at a position of each way to attend; and a wrong word is found."""
    one = model("deep", HALVES[0], True)
    frame = run_frame(one, library(HALVES[0]), position, seed=3, packed=position == 128)
    assert frame.faults() == []
    k, v = frame.caches.split(one.config.slow.layers)
    phases = frame_phases.Frame(
        one.config, one.weights, one.rows.head, frame.launch, frame.tokens[0], torch.tensor(frame.codes), position,
        [*k], [*v], frame.main_logits, frame.fast_logits[0],
    )  # fmt: skip
    phases.check()
    swiglu = next(p for p in Phases(one.config, one.weights, one.rows.head).list if p.kind == Kind.SWIGLU)
    frame.launch.tensors[FRAME.pointers.index("words")][swiglu.out + 3] ^= 1 << 14  # an exponent's bit
    with pytest.raises(AssertionError, match="slow 0 SWIGLU"):
        phases.check()


@pytest.mark.parametrize("shift", [0, 1])
def test_every_pair_of_chunks_is_measured(library, shift):
    """The emulator's time says nothing else."""
    memory, other = torch.zeros(9, 8192, dtype=torch.uint8), torch.zeros(8, 8192, dtype=torch.uint8)
    lead, where = (torch.full((n,), -1, dtype=torch.int32) for n in (9, 4))
    with library(HALVES[0]).bound(seed=1):
        l2_halves.MEASURE.bind(
            HALVES[0], memory.device, grid=4, memory=memory, other=other, lead=lead, where=where, pairs=9, others=8,
            shift=shift, zero=0,
        ).enqueue(0)  # fmt: skip
    assert where.tolist() == [0, 1, 2, 3]
    assert not lead.any()


@pytest.mark.parametrize("room", [1 << 20, 1 << 30])
def test_l2_is_to_keep_weights_that_come_again(room):
    """As much as there is room for, of the fast stack's alone."""
    one = model("small", HALVES[0], False)
    phases = Phases(one.config, one.weights, one.rows.head)
    shares = phases.kept_shares(room)
    slow = 1 + next(i for i, phase in enumerate(phases.list) if phase.kind == Kind.HEAD)
    assert set(shares[:slow]) == {0.0} and len(set(shares[slow:])) == 1 and len(shares) == len(phases.list)
    again = [t for w in one.weights.fast for t in (w.wqkv, w.wo, w.w1, w.w2, w.w3)] + [one.weights.fast_head[:1024]]
    size = sum(t.nbytes for t in again)
    assert shares[-1] == pytest.approx(min(1.0, room / size))


def test_a_frame_of_a_text_token_is_right(library):
    assert run_frame(model("small", HALVES[0], True), library(HALVES[0]), 5, text=True, seed=1).faults() == []


def test_a_second_call_gives_the_same_bits(library, small_frame):
    """Tagged words of the call before are still there."""
    frame = run_frame(model("small", HALVES[0], True), library(HALVES[0]), 17, seed=1, times=2)
    assert same_bits(frame, small_frame(HALVES[0], 17, 1))


@pytest.mark.parametrize("position", [17, 1030])
def test_what_racecheck_sees_computes_the_same(library, small_frame, position):
    frame = run_frame(model("small", HALVES[0], True), library("racecheck"), position, seed=1)
    assert same_bits(frame, small_frame(HALVES[0], position, 1))


def test_a_missing_release_is_a_deadlock(library, monkeypatch):
    """Nobody tells the warp that streams weights that a slot is free. The report says where it waits."""
    monkeypatch.setenv("NO_RELEASE", "1")
    with pytest.raises(LaunchFailed, match=r"deadlock[^$]*mbarrier: [^$]*weight_ring\.cuh"):
        run_frame(model("small", HALVES[0], True), library("faults"), 5)


def test_a_missing_barrier_makes_results_wrong(library, monkeypatch):
    """Warps add up sums of others that are not there yet."""
    monkeypatch.setenv("NO_BARRIER", "1")
    assert run_frame(model("small", HALVES[0], True), library("faults"), 5, seed=1).faults()
