"""`StepBudget`: the shares of batches in the budget loss of their optimizer step."""

import pytest
import torch
from accelerate import Accelerator
from helpers import clsr

from peft_clsr.distillation.step_budget import StepBudget


@pytest.fixture
def budget(tiny_whisper):
    model = clsr(tiny_whisper(), ("ca", "uk"), gate_budget=0.5)
    return StepBudget(model, Accelerator(cpu=True), over_processes=False)


def test_shares_of_counted_batches_add_up_to_the_loss_of_the_step(budget):
    """Batches on both sides of the budget; "uk" is in one of them only."""
    batches = [([6.0, 1.0], [8, 10]), ([2.0, 0.0], [12, 0]), ([9.0, 0.0], [10, 0])]
    batches = [torch.tensor(gates) for gates in batches]  # sums and counts of both adapters
    budget.step_gates = sum(batches)
    shares = sum(budget.losses(gates, is_whole_step=False) for gates in batches)
    expected = [abs(17 / 30 - 0.5) * 30 / 40, abs(1 / 10 - 0.5) * 10 / 40]
    assert shares.tolist() == pytest.approx(expected)
    whole = budget.losses(sum(batches), is_whole_step=True)
    assert whole.tolist() == pytest.approx(expected)


def test_counting_adds_batches_up_and_leaves_the_random_state(budget):
    def forward(adapter_names):
        budget.routing.forward_gates.sums = torch.rand(len(adapter_names))
        budget.routing.forward_gates.counts = torch.full((len(adapter_names),), 3.0)
        return adapter_names

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    budget.count([["ca", "ca"], ["uk"]], forward)
    sums, counts = budget.step_gates.tolist()
    assert sums == pytest.approx([(expected[0] + expected[1]).item(), expected[2].item()])
    assert counts == [6, 3]
    assert torch.equal(torch.rand(3), expected)
    budget.end_step()
    assert budget.step_gates is None


def test_a_step_without_routed_tokens_has_no_loss(budget):
    gates = budget.batch_gates([])
    assert gates.tolist() == [[0, 0], [0, 0]]
    assert budget.weighted_sum(budget.losses(gates, is_whole_step=True)).item() == 0
