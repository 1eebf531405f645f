"""The loss mathematics against scipy's and torch's own."""

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon

from peft_clsr.trainer.losses import cross_entropy_sum, distillation_sum


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
