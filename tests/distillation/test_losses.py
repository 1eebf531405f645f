"""The loss mathematics against scipy's and torch's own, and losses in chunks against the plain formulas."""

import operator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from peft_clsr.distillation.losses import TeacherTargets, chunked_losses, cross_entropy_sum, distillation_sum


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 5, 11, generator=generator, dtype=torch.float64) * 3
    teacher = torch.randn(3, 5, 11, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, 11, (3, 5), generator=generator)
    labels[0, 3:] = -100
    labels[2, 1:] = -100
    return student, teacher, labels


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs_sum_over_label_positions(batch, label_smoothing):
    student, _, labels = batch
    expected = F.cross_entropy(
        student.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum", label_smoothing=label_smoothing
    )
    actual = cross_entropy_sum(student, labels, label_smoothing=label_smoothing)
    assert actual.shape == ()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_js_equals_scipys_squared_distance_times_temperature_squared(batch, temperature):
    student, teacher, labels = batch
    p = (teacher / temperature).softmax(-1)[labels != -100].numpy()
    q = (student / temperature).softmax(-1)[labels != -100].numpy()
    expected = temperature**2 * (jensenshannon(p, q, axis=-1) ** 2).sum()  # natural logarithm
    actual = distillation_sum(student, teacher, labels, kind="js", temperature=temperature)
    assert actual.shape == ()
    assert actual.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_kl_equals_torchs_kl_of_teacher_from_student_times_temperature_squared(batch, temperature):
    student, teacher, labels = batch
    keep = labels != -100
    expected = temperature**2 * F.kl_div(
        (student[keep] / temperature).log_softmax(-1),
        (teacher[keep] / temperature).log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    actual = distillation_sum(student, teacher, labels, kind="kl", temperature=temperature)
    assert actual.shape == ()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


def test_js_is_the_default_and_is_symmetric_where_kl_is_not(batch):
    student, teacher, labels = batch
    js = distillation_sum(student, teacher, labels)
    assert js.item() == pytest.approx(distillation_sum(student, teacher, labels, kind="js").item())
    assert js.item() == pytest.approx(distillation_sum(teacher, student, labels).item(), rel=1e-5)
    kl = distillation_sum(student, teacher, labels, kind="kl")
    assert kl.item() != pytest.approx(distillation_sum(teacher, student, labels, kind="kl").item(), rel=1e-2)


@pytest.mark.parametrize("kind", ["js", "kl"])
def test_equal_logits_give_zero_distillation_loss_and_zero_gradient(batch, kind):
    student, _, labels = batch
    student = student.float().requires_grad_()
    loss = distillation_sum(student, student.detach().clone(), labels, kind=kind, temperature=2.0)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["js", "kl"])
def test_padding_positions_have_neither_value_nor_gradient(batch, kind):
    student, teacher, labels = batch
    padding = labels == -100
    changed = student.clone()
    changed[padding] = 7.0 * torch.randn_like(changed[padding])
    changed.requires_grad_()

    kd = distillation_sum(changed, teacher, labels, kind=kind)
    ce = cross_entropy_sum(changed, labels, label_smoothing=0.1)
    assert kd.item() == pytest.approx(distillation_sum(student, teacher, labels, kind=kind).item(), rel=1e-9)
    assert ce.item() == pytest.approx(cross_entropy_sum(student, labels, label_smoothing=0.1).item(), rel=1e-9)
    (kd + ce).backward()
    assert changed.grad[padding].eq(0).all()
    assert changed.grad[~padding].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("kind", ["js", "kl"])
def test_no_label_at_all_gives_zero(batch, kind):
    student, teacher, labels = batch
    nothing = torch.full_like(labels, -100)
    assert distillation_sum(student, teacher, nothing, kind=kind).item() == 0
    assert cross_entropy_sum(student, nothing, label_smoothing=0.1).item() == 0


@pytest.mark.parametrize("kind", ["js", "kl"])
def test_gradient_matches_finite_differences(batch, kind):
    student, teacher, labels = (tensor[:1, :3] for tensor in batch)
    student = student.clone().requires_grad_()
    loss = distillation_sum(student, teacher, labels, kind=kind, temperature=1.5)
    loss.backward()
    # Central differences need float64 all the way; float32 inside leaves about 1e-4 with this step.
    step = 1e-2
    for index in [(0, 0, 0), (0, 1, 4), (0, 2, 10)]:
        values = []
        for sign in (1, -1):
            moved = student.detach().clone()
            moved[index] += sign * step
            values.append(distillation_sum(moved, teacher, labels, kind=kind, temperature=1.5).item())
        assert student.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=2e-3)


@pytest.mark.parametrize("kind", ["js", "kl"])
def test_half_precision_logits_give_finite_loss_close_to_float64(batch, kind):
    student, teacher, labels = batch
    student, teacher = student.bfloat16(), teacher.bfloat16()
    expected = distillation_sum(student.double(), teacher.double(), labels, kind=kind)
    actual = distillation_sum(student, teacher, labels, kind=kind)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.parametrize("kind", ["js", "kl"])
def test_suppressed_tokens_give_finite_loss_and_gradient(batch, kind):
    """Logits of -1e4, whose probability underflows to 0, occur where a teacher suppresses tokens."""
    student, teacher, labels = batch
    student, teacher = student.float().clone(), teacher.float().clone()
    teacher[..., 0] = student[..., 0] = -1e4
    student.requires_grad_()
    loss = distillation_sum(student, teacher, labels, kind=kind)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_an_unknown_kind_is_named(batch):
    with pytest.raises(ValueError, match="cosine"):
        distillation_sum(*batch, kind="cosine")


@pytest.mark.parametrize("kind", ["js", "kl"])
def test_the_teacher_is_a_constant(batch, kind):
    student, teacher, labels = batch
    student.requires_grad_(), teacher.requires_grad_()
    distillation_sum(student, teacher, labels, kind=kind).backward()
    assert teacher.grad is None and student.grad.abs().max() > 0


@dataclass
class Step:
    """11 label positions of a student with 13 tokens and a teacher with 14, of which 10 are common."""

    states: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    labels: torch.Tensor
    targets: TeacherTargets

    @property
    def leaves(self):
        return self.states, self.weight, self.bias

    def chunked(self, targets=None, chunk_size=4, **kwargs):
        return chunked_losses(*self.leaves, self.labels, targets, chunk_size=chunk_size, **kwargs)

    def plain(self, targets=None, ce_weight=1.0, kd_weight=1.0, label_smoothing=0.0, **kwargs):
        """The same by the plain formulas."""
        logits = F.linear(*self.leaves)
        ce_sum = cross_entropy_sum(logits, self.labels, label_smoothing)
        kd_sum = torch.zeros(())
        if targets is not None:
            student, teacher, labels = logits, targets.output_layer(targets.hidden_states), self.labels
            if targets.student_ids is not None:
                student, teacher = student[:, targets.student_ids], teacher[:, targets.teacher_ids]
            if targets.mask is not None:
                labels = labels.where(targets.mask, -100)
            kd_sum = distillation_sum(student, teacher, labels, **kwargs)
        return ce_weight * ce_sum + kd_weight * kd_sum, ce_sum, kd_sum


@pytest.fixture
def make_step():
    def build(dtype=torch.float64, same_vocabulary=False, all_taught=True, positions=11):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        vocabulary = 13 if same_vocabulary else 14
        output_layer = nn.Linear(7, vocabulary, bias=False).requires_grad_(False)
        output_layer.weight.data = randn(vocabulary, 7)
        targets = TeacherTargets(randn(positions, 7), output_layer)
        if not same_vocabulary:
            targets.student_ids = torch.tensor([0, 1, 2, 4, 5, 6, 8, 9, 11, 12])
            targets.teacher_ids = torch.tensor([0, 1, 3, 2, 5, 7, 8, 10, 12, 13])
        if not all_taught:
            targets.mask = torch.arange(positions) % 3 != 1
        leaves = randn(positions, 5).requires_grad_(), randn(13, 5).requires_grad_(), randn(13).requires_grad_()
        return Step(*leaves, torch.randint(0, 13, (positions,), generator=generator), targets)

    return build


def gradients(step, loss):
    return torch.autograd.grad(loss, [leaf for leaf in step.leaves if leaf.requires_grad])


def assert_equal_steps(step, actual, expected, rel=1e-9):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=rel)
    for ours, theirs in zip(gradients(step, actual[0]), gradients(step, expected[0]), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= rel * theirs.norm()


@pytest.mark.parametrize("all_taught", [True, False], ids=["all_taught", "some_taught"])
@pytest.mark.parametrize("same_vocabulary", [True, False], ids=["same_vocabulary", "common_tokens"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["js", "kl"])
def test_chunks_give_the_losses_and_gradients_of_the_plain_formulas(
    make_step, kind, temperature, label_smoothing, same_vocabulary, all_taught
):
    step = make_step(same_vocabulary=same_vocabulary, all_taught=all_taught)
    kwargs = {"kind": kind, "temperature": temperature, "label_smoothing": label_smoothing, "ce_weight": 0.7}
    kwargs["kd_weight"] = 2.0
    expected = step.plain(step.targets, **kwargs)
    assert expected[2].item() > 0.5
    assert_equal_steps(step, step.chunked(step.targets, **kwargs), expected)


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 11, 128])
def test_any_chunk_size_gives_the_same(make_step, chunk_size):
    step = make_step(all_taught=False)
    assert_equal_steps(step, step.chunked(step.targets, chunk_size=chunk_size), step.plain(step.targets))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_without_a_teacher_chunks_give_the_cross_entropy(make_step, label_smoothing):
    step = make_step()
    actual = step.chunked(label_smoothing=label_smoothing)
    assert_equal_steps(step, actual, step.plain(label_smoothing=label_smoothing))
    assert actual[2].item() == 0


def test_chunks_in_float32_are_within_1e_5_of_the_plain_formulas(make_step):
    step = make_step(torch.float32, all_taught=False)
    kwargs = {"label_smoothing": 0.1, "kd_weight": 2.0, "temperature": 2.0}
    assert_equal_steps(step, step.chunked(step.targets, **kwargs), step.plain(step.targets, **kwargs), rel=1e-5)


@pytest.mark.parametrize("kind", ["js", "kl"])
def test_chunked_gradients_match_finite_differences(make_step, kind):
    step = make_step(all_taught=False)

    def loss(states, weight, bias):
        moved = (states, weight, bias, step.labels, step.targets)
        return chunked_losses(*moved, kind=kind, temperature=1.5, label_smoothing=0.1, chunk_size=4)[0]

    assert torch.autograd.gradcheck(loss, step.leaves)


def test_a_frozen_output_layer_without_bias_gets_no_gradient(make_step):
    step = make_step()
    step.weight.requires_grad_(False)
    step.bias = None
    losses = chunked_losses(step.states, step.weight, None, step.labels, step.targets, chunk_size=4)
    losses[0].backward()
    expected = cross_entropy_sum(step.states @ step.weight.T, step.labels)
    assert losses[1].item() == pytest.approx(expected.item(), rel=1e-9)
    assert step.weight.grad is None and step.states.grad.abs().max() > 0


def test_backward_scales_the_gradients_and_can_run_twice(make_step):
    step = make_step()
    expected = gradients(step, step.chunked(step.targets)[0])
    loss = 3 * step.chunked(step.targets)[0]
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, gradient in zip(step.leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 6 * gradient)


def test_a_second_derivative_is_refused(make_step):
    step = make_step()
    (gradient,) = torch.autograd.grad(step.chunked()[0] ** 2, step.states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_without_gradients_the_sums_are_the_same(make_step):
    step = make_step(all_taught=False)
    expected = step.chunked(step.targets)
    for no_gradient in (torch.no_grad, torch.inference_mode):
        with no_gradient():
            losses = step.chunked(step.targets)
        assert [loss.item() for loss in losses] == [loss.item() for loss in expected]
        assert not any(loss.requires_grad for loss in losses)
    assert expected[0].requires_grad and not expected[1].requires_grad and not expected[2].requires_grad


@pytest.mark.parametrize("kind", ["js", "kl"])
def test_autocast_takes_products_in_its_dtype_and_losses_in_float32(make_step, kind):
    step = make_step(torch.float32, all_taught=False)
    exact = step.plain(step.targets, kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step.chunked(step.targets, kind=kind)
        expected = step.plain(step.targets, kind=kind)
    for ours, theirs, in_float32 in zip(actual, expected, exact, strict=True):
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        assert ours.item() != pytest.approx(in_float32.item(), rel=1e-4)
    for ours, theirs in zip(gradients(step, actual[0]), gradients(step, expected[0]), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


def test_gradients_of_half_precision_come_in_half_precision(make_step):
    step = make_step(torch.bfloat16)
    actual, expected = step.chunked(step.targets), step.plain(step.targets)
    assert actual[0].dtype == torch.float32
    assert actual[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    for ours, theirs in zip(gradients(step, actual[0]), gradients(step, expected[0]), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


def test_cached_states_in_float16_are_cast_to_the_teachers_dtype(make_step):
    step = make_step(torch.float32)
    cached = replace(step.targets, hidden_states=step.targets.hidden_states.half())
    kd_sum = step.chunked(cached)[2].item()
    assert kd_sum == pytest.approx(step.chunked(step.targets)[2].item(), rel=1e-3)
    assert kd_sum == step.chunked(replace(cached, hidden_states=cached.hidden_states.float()))[2].item()


def test_no_position_gives_zero_and_zero_gradients(make_step):
    step = make_step(positions=0)
    losses = step.chunked(step.targets, label_smoothing=0.1)
    assert [loss.item() for loss in losses] == [0, 0, 0]
    for leaf, gradient in zip(step.leaves, gradients(step, losses[0]), strict=True):
        assert gradient.shape == leaf.shape and gradient.eq(0).all()


def test_untaught_positions_may_hold_anything(make_step):
    step = make_step(all_taught=False)
    expected = step.chunked(step.targets)
    step.targets.hidden_states[~step.targets.mask] = float("nan")
    assert_equal_steps(step, step.chunked(step.targets), expected)
    step.targets.mask[:] = False
    assert_equal_steps(step, step.chunked(step.targets), step.plain())


def test_the_teachers_logits_are_not_made_where_they_do_not_count(make_step):
    step = make_step()
    calls = []
    step.targets.output_layer = lambda states: calls.append(len(states)) or states.new_zeros(len(states), 14)
    assert step.chunked(step.targets, kd_weight=0.0)[2].item() == 0
    assert calls == []
    step.chunked(step.targets)
    assert calls == [4, 4, 3]


def test_a_teacher_on_another_device_is_met_on_the_students(make_step):
    with FakeTensorMode(), torch.no_grad():  # devices are checked, nothing is computed
        step = make_step(torch.float32)
        layer = nn.Linear(7, 14, device="meta")
        elsewhere = replace(step.targets, hidden_states=torch.empty(11, 7, device="meta"), output_layer=layer)
        losses = step.chunked(elsewhere)
    assert [loss.device.type for loss in losses] == ["cpu"] * 3


def test_compilation_leaves_chunks_alone(make_step):
    step = make_step()
    rest = step.weight, step.bias, step.labels, step.targets

    def loss(states):
        return chunked_losses(states * 2, *rest, chunk_size=4)[0] * 3

    operations = []

    def backend(graph, inputs):
        operations.extend(node.target for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    expected = gradients(step, loss(step.states))
    for ours, theirs in zip(gradients(step, torch.compile(loss, backend=backend)(step.states)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert operations == [operator.mul, operator.mul]


def test_numbers_of_positions_that_differ_are_named(make_step):
    step = make_step()
    step.targets.hidden_states = step.targets.hidden_states[:9]
    with pytest.raises(ValueError, match=r"labels has 11, targets\.hidden_states has 9"):
        step.chunked(step.targets)


def peak_bytes(function):
    """Most memory that a call holds at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("kind", ["js", "kl"])
def test_distillation_adds_at_most_a_quarter_of_the_plain_formulas_peak_memory(kind):
    """16 x 128 positions as in training; a vocabulary of 500 stands for Whisper's 51,865."""
    torch.manual_seed(0)
    targets = TeacherTargets(torch.randn(16 * 128, 8), nn.Linear(8, 500).requires_grad_(False))
    states = torch.randn(16 * 128, 8, requires_grad=True)
    step = Step(states, torch.randn(500, 8), torch.zeros(500), torch.randint(0, 500, (16 * 128,)), targets)

    def added(losses, **kwargs):
        with_teacher = peak_bytes(lambda: losses(targets, kind=kind, **kwargs)[0].backward())
        return with_teacher - peak_bytes(lambda: losses(**kwargs)[0].backward())

    plain = added(step.plain)
    assert plain > 4 * 2048 * 500 * 4  # several float32 [positions, vocabulary]
    assert 0 < added(step.chunked, chunk_size=128) <= plain / 4
