from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from policies import BY_NAME

from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.plans import trained_layers
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.data.loading import text_dataset
from fleetune.device_runtime.data.samples import Dense, make_dataset
from fleetune.device_runtime.draws import Draws
from fleetune.device_runtime.errors import ArtifactError, ConfigError
from fleetune.device_runtime.methods.optim import OPTIMIZERS
from fleetune.device_runtime.methods.policies import POLICIES, make_gates, make_policy
from fleetune.device_runtime.training.evaluation import evaluate
from fleetune.device_runtime.training.trainer import Trainer

WORDS = ("sad cry tears", "glad joy smile", "mad rage shout")


@pytest.fixture
def manifest(make_manifest):
    return make_manifest()


@pytest.fixture
def dataset(text_folder, manifest):
    """45 texts of three classes, told apart by their words."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 45)
    texts = [" ".join(rng.choice(WORDS[label].split(), rng.integers(1, 12))) for label in labels]
    inputs = text_dataset(texts, manifest, text_folder, seq_len=16)
    columns = {**inputs.columns, "labels": Dense(labels.astype(np.int64))}
    return make_dataset(columns, inputs.lengths, seq_len=16, num_classes=3)


def work(name="full", optimizer="adamw", *, lr=0.02, **changes):
    uses = POLICIES[name].uses
    policy = msgspec.structs.replace(BY_NAME[name], drop=0.4 * ("drop" in uses))
    spec = OptimizerSpec(
        name=optimizer, lr=lr, warmup_steps=3, decay="cosine", clip_norm=1.0, weight_decay=0.01, proximal=0.1
    )
    return LocalWork(
        **{"policy": policy, "optimizer": spec, "epochs": 3, "batch_size": 8, "seed": 5, **changes}
    )


@pytest.fixture
def make_trainer(linear_stack, manifest, dataset):
    def make(job, stack=None):
        stack = stack or linear_stack(manifest)
        return Trainer(stack, dataset, job, stack.adapter())

    return make


def run(trainer, num_steps=None):
    reports = []
    while not trainer.done and (num_steps is None or len(reports) < num_steps):
        reports.append(trainer.step())
    return reports


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_run_cut_anywhere_ends_equal_to_the_bit(make_trainer, tmp_path, name, optimizer):
    job = work(name, optimizer)
    straight = make_trainer(job)
    reports = run(straight)
    assert len(reports) == straight.total_steps == 18
    for cut in (1, 6, 13, 18):
        first = make_trainer(job)
        run(first, cut)
        first.save(tmp_path / "c.safetensors")
        second = make_trainer(job)
        second.restore(tmp_path / "c.safetensors")
        rest = run(second)
        assert equal(second.adapter, straight.adapter)
        assert [r.loss for r in rest] == [r.loss for r in reports[cut:]]
        assert [r[:4] for r in second.history] == [r[:4] for r in reports]
        assert second.importance == straight.importance


def test_the_most_moved_layers_stay_wherever_a_run_is_cut(make_trainer, tmp_path):
    job = work("exact-k", personal=1)
    straight, cut = make_trainer(job), make_trainer(job)
    run(straight)
    assert min(straight.importance) > 0
    run(cut, 7)
    cut.save(tmp_path / "c.safetensors")
    again = make_trainer(job)
    again.restore(tmp_path / "c.safetensors")
    assert again.importance == cut.importance
    run(again)
    assert again.importance == straight.importance
    assert again.personal == {f"layer{int(np.argmax(straight.importance))}.a"}
    assert make_trainer(job).personal == set(), "nothing was trained yet"


def test_any_adapter_is_measured_on_what_was_held_out(make_trainer, linear_stack, manifest):
    trainer = make_trainer(work(personal=1, held_out=0.2))
    start = trainer.adapter
    run(trainer)
    own, reference = trainer.measure(trainer.adapter), trainer.measure(start)
    assert (own.loss, own.accuracy) == (
        trainer.stats["held_loss_after"],
        trainer.stats["held_accuracy_after"],
    )
    assert (reference.loss, reference.num_samples) == (trainer.stats["held_loss_before"], 9)
    assert make_trainer(work(personal=1)).measure(start) is None


def test_a_checkpoint_of_a_release_without_importance_is_gone_on_from(make_trainer, tmp_path):
    path = tmp_path / "c.safetensors"
    first = make_trainer(work())
    run(first, 7)
    first._importance = SimpleNamespace(columns=dict)
    first.save(path)
    again, straight = make_trainer(work()), make_trainer(work())
    again.restore(path)
    run(again), run(straight)
    assert equal(again.adapter, straight.adapter)


def test_a_tensor_that_a_shared_layer_has_too_does_not_stay(linear_stack, make_manifest, dataset):
    """Layers 0 and 1 have one adapter between them."""
    manifest = make_manifest()
    layers = (manifest.layers[0], manifest.layers[0], manifest.layers[2])
    tied = msgspec.structs.replace(manifest, layers=layers)
    assert tied.layer_adapters == ({"layer0.a"}, {"layer0.a"}, {"layer2.a"})
    trainer = Trainer(linear_stack(manifest), dataset, work(personal=1), linear_stack(manifest).adapter())
    trainer._adapters = tied.layer_adapters
    trainer._importance = SimpleNamespace(values=(2.0, 1.0, 0.5))
    assert trainer.personal == set()


def test_a_device_that_would_share_no_adapter_of_a_layer_is_refused(linear_stack, make_manifest, dataset):
    manifest = make_manifest()
    layers = tuple(
        msgspec.structs.replace(layer, tensors=layer.tensors * (i > 0))
        for i, layer in enumerate(manifest.layers)
    )
    sparse = linear_stack(msgspec.structs.replace(manifest, layers=layers))
    Trainer(sparse, dataset, work(personal=1), sparse.adapter())
    with pytest.raises(ConfigError, match="personal 2: one layer at least is shared, and 2 have an adapter"):
        Trainer(sparse, dataset, work(personal=2), sparse.adapter())


@pytest.mark.parametrize("name", ["successive", "cyclic"])
def test_a_later_round_goes_on_with_the_groups_where_the_last_one_stopped(
    make_trainer, linear_stack, manifest, name
):
    """Three groups of one layer, four steps each; six steps a round, counted as steps or as an epoch of the data."""

    def plans(**changes):
        stack = linear_stack(manifest)
        policy = PolicySpec(name=name, drop=0.6, period=4)
        run(make_trainer(work(**{"policy": policy, **changes}), stack))
        return stack.plans

    whole = plans(steps=24)
    assert len(set(whole)) == 3
    rounds = [plans(steps=6, rounds_before=n) for n in range(4)]
    assert [plan for made in rounds for plan in made] == whole
    assert [plans(epochs=1, rounds_before=n) for n in range(4)] == rounds


def test_plans_are_drawn_for_the_seed_and_the_step(make_trainer, linear_stack, manifest):
    stack, job = linear_stack(manifest), work("exact-k")
    run(make_trainer(job, stack))
    policy = make_policy(job.policy, manifest.num_layers)
    assert stack.plans == [policy(i, Draws(5, "plans", i), {}) for i in range(18)]


def test_rows_have_gates_of_their_own_and_the_report_their_mean_depth(make_trainer, linear_stack, manifest):
    """45 samples in batches of 8: the last of an epoch has 5 rows."""
    stack = linear_stack(manifest)
    job = work(policy=PolicySpec(name="bernoulli", drop=0.5, gates="row"), epochs=1)
    reports, depths = run(make_trainer(job, stack)), []
    make, sizes = make_gates(job.policy, 3), [gates.shape[1] for gates in stack.gates]
    assert sorted(sizes) == [5, 8, 8, 8, 8, 8]
    for step, gates in enumerate(stack.gates):
        np.testing.assert_array_equal(gates, make(step, Draws(5, "plans", step), {}, sizes[step]))
        depths.append(gates.sum() / sizes[step])
    assert [report.active_layers for report in reports] == pytest.approx(depths)
    assert set(depths) == {1.5, 1.2}  # 4 of 8 rows, 2 of 5


def test_a_run_with_gates_and_effects_is_cut_and_goes_on_to_the_bit(make_trainer, tmp_path):
    policy = msgspec.structs.replace(BY_NAME["exact-k"], drop=0.3, gates="row", protect="effect", horizon=30)
    job = work(policy=policy, rounds_before=1)
    straight, first, second = (make_trainer(job) for _ in range(3))
    reports = run(straight)
    run(first, 7)
    first.save(tmp_path / "c.safetensors")
    second.restore(tmp_path / "c.safetensors")
    assert [r.loss for r in run(second)] == [r.loss for r in reports[7:]]
    assert equal(second.adapter, straight.adapter)
    assert [r.active_layers for r in second.history] == [r.active_layers for r in straight.history]


def test_a_schedule_falls_through_all_rounds(make_trainer, linear_stack, manifest):
    """Six steps a round: the horizon lies at the end of the second."""
    policy = PolicySpec(name="exact-k", drop=0.9, schedule="falling", horizon=12)

    def depths(rounds_before):
        return [
            r.active_layers
            for r in run(make_trainer(work(policy=policy, steps=6, rounds_before=rounds_before)))
        ]

    assert depths(0) + depths(1) == [max(1, round(3 * (1 - 0.9 * (12 - step) / 12))) for step in range(12)]
    assert depths(2) == [3] * 6


@pytest.mark.parametrize(
    ("policy", "cache_below", "told"),
    [
        (PolicySpec(name="dropbp", drop=0.5, width=2), -1, 1),
        (PolicySpec(name="coto", drop=0.5), -1, 0),
        (PolicySpec(name="coto", drop=0.5, width=2), 0, 0),
        (PolicySpec(name="exact-k", drop=0.5), -1, -1),
        (PolicySpec(name="exact-k", drop=0.5), 2, 2),
    ],
)
def test_the_engine_is_told_below_which_layer_none_learns(
    make_trainer, linear_stack, manifest, policy, cache_below, told
):
    stack, seen = linear_stack(manifest), []
    step = stack.step
    stack.step = lambda *rest, **named: (seen.append(named["cache_below"]), step(*rest, **named))[1]
    run(make_trainer(work(policy=policy, cache_below=cache_below, steps=3), stack))
    assert seen == [told] * 3


def test_every_epoch_has_an_order_of_its_own(make_trainer, linear_stack, manifest):
    stack, seen = linear_stack(manifest), []
    step = stack.step
    stack.step = lambda batch, *rest, **named: (
        seen.append(batch["labels"].tolist()) or step(batch, *rest, **named)
    )
    run(make_trainer(work(epochs=2), stack))
    assert len(seen) == 12
    assert seen[:6] != seen[6:]
    assert sorted(np.concatenate(seen[:6])) == sorted(np.concatenate(seen[6:]))


def test_a_run_is_pulled_to_the_adapter_it_started_from(make_trainer):
    def way(mu):
        trainer = make_trainer(msgspec.structs.replace(work(), optimizer=OptimizerSpec(lr=0.1, proximal=mu)))
        start = trainer.adapter
        run(trainer)
        return sum(float(((trainer.adapter[n] - start[n]) ** 2).sum()) for n in start)

    assert way(0.0) > 2 * way(10.0) > 0


def test_training_learns(make_trainer, linear_stack, manifest, dataset):
    stack = linear_stack(manifest)
    trainer = make_trainer(work(epochs=10), stack)
    before = evaluate(stack, dataset, stack.adapter())
    run(trainer)
    after = evaluate(stack, dataset, trainer.adapter, batch_size=7)
    assert after.accuracy > before.accuracy
    assert after.num_samples == 45
    assert after.loss < before.loss / 2


def test_what_a_plan_leaves_out_is_left_alone(make_trainer, linear_stack, manifest):
    stack = linear_stack(manifest)
    trainer = make_trainer(work("exact-k"), stack)
    while not trainer.done:
        before = trainer.adapter
        report = trainer.step()
        trained = {f"layer{i}.a" for i in trained_layers(stack.plans[-1])}
        changed = {name for name in before if not np.array_equal(before[name], trainer.adapter[name])}
        assert changed == trained | {"head.w"}
        assert report.active_layers == len(trained) == 2
    assert len(set(stack.plans)) > 1


def test_the_starting_adapter_is_not_written_to(linear_stack, manifest, dataset):
    stack = linear_stack(manifest)
    start = stack.adapter()
    run(Trainer(stack, dataset, work(), start))
    assert equal(start, stack.adapter())


def test_times_are_of_the_clock_that_was_given(linear_stack, manifest, dataset, tmp_path):
    def saved(path):
        stack, ticks = linear_stack(manifest), iter(range(100))
        trainer = Trainer(stack, dataset, work(steps=3), stack.adapter(), clock=lambda: float(next(ticks)))
        assert [report.seconds for report in run(trainer)] == [1.0] * 3
        trainer.save(path)
        return path.read_bytes()

    assert saved(tmp_path / "a") == saved(tmp_path / "b")


def test_a_run_asks_its_engine_once_how_its_rows_run(linear_stack, manifest, dataset):
    stack, asked, given = linear_stack(manifest), [], []
    rows, step, memory = stack.rows, stack.step, MemoryPlan(micro_batch=4)
    stack.rows = lambda *sizes: (asked.append(sizes), rows(*sizes)._replace(lanes=3))[1]
    stack.step = lambda *rest, **named: (given.append(named["rows"].lanes), step(*rest, **named))[1]
    run(Trainer(stack, dataset, work(steps=7), stack.adapter(), memory=memory))
    assert asked == [(8, dataset.mean_tokens, memory)]
    assert given == [3] * 7


@pytest.mark.parametrize("given", [None, MemoryPlan(2, saved_layers=1)])
def test_the_bound_in_tokens_that_work_asks_joins_the_plan_it_is_given(
    linear_stack, manifest, dataset, given
):
    stack, asked = linear_stack(manifest), []
    rows = stack.rows
    stack.rows = lambda *sizes: (asked.append(sizes), rows(*sizes))[1]
    Trainer(stack, dataset, work(micro_tokens=32), stack.adapter(), memory=given)
    assert asked[-1] == (8, dataset.mean_tokens, (given or MemoryPlan())._replace(micro_tokens=32))


def test_steps_count_instead_of_epochs_and_reports_tell_where_we_are(make_trainer):
    trainer = make_trainer(work(steps=7))
    reports = run(trainer)
    assert [r.step for r in reports] == list(range(7))
    assert {r.total_steps for r in reports} == {7}
    assert trainer.step_index == 7
    assert all(r.seconds > 0 for r in reports)


def test_the_seed_decides(make_trainer):
    def final(seed):
        trainer = make_trainer(work("bernoulli", seed=seed))
        run(trainer)
        return trainer.adapter

    assert equal(final(1), final(1))
    assert not equal(final(1), final(2))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the little model overflows, as it should
def test_what_is_not_finite_stops_the_run_where_it_stands(make_trainer):
    job = work(optimizer="sgd", lr=1e38, steps=50)
    trainer = make_trainer(job)
    with pytest.raises(
        ConfigError, match=r"step \d+: .*(not finite|loss is).*lower learning rate than 1e\+38"
    ):
        run(trainer)
    assert all(np.isfinite(value).all() for value in trainer.adapter.values())
    assert trainer.step_index == len(trainer.history) < 50


@pytest.mark.parametrize("part", ["artifact", "data", "starting adapter", "lr", "seed"])
def test_a_checkpoint_of_another_run_is_refused(
    make_trainer, linear_stack, make_manifest, dataset, tmp_path, part
):
    path = tmp_path / "c.safetensors"
    trainer = make_trainer(work())
    trainer.step()
    trainer.save(path)
    stack, data, job = linear_stack(make_manifest()), dataset, work()
    start = stack.adapter()
    if part == "artifact":
        object.__setattr__(stack.artifact, "digest", "e" * 64)
    elif part == "data":
        data = dataset.subset(np.arange(40))
    elif part == "starting adapter":
        start["head.w"] += 1
    else:
        job = work(seed=6) if part == "seed" else work(lr=0.5)
    with pytest.raises(ConfigError, match=rf"c\.safetensors: a checkpoint of another run \(.*{part}"):
        Trainer(stack, data, job, start).restore(path)


def test_wrong_work_and_wrong_adapters_are_refused(make_trainer, linear_stack, manifest, dataset):
    with pytest.raises(ConfigError, match="nothing to do: steps and epochs are both 0"):
        make_trainer(work(epochs=0))
    with pytest.raises(
        ConfigError,
        match=r"steps must be at least 0, got -1; seed must be at least 0 .*, got -2; rounds_before must be .*, got -3",
    ):
        make_trainer(work(steps=-1, seed=-2, rounds_before=-3))
    with pytest.raises(ConfigError, match=r"seed must be .* below 9007199254740992, got"):
        make_trainer(work(seed=2**53))
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        make_trainer(work(batch_size=0))
    with pytest.raises(ArtifactError, match=r"head\.w: missing"):
        Trainer(linear_stack(manifest), dataset, work(), {})
