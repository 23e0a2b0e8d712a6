"""Parameter groups and the learning-rate schedule, against transformers and torch."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from llama_lib.optim import learning_rate, parameter_groups, parameter_names, set_learning_rate


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=64,
        )
    )


def test_norms_do_not_decay_and_nothing_is_left_out(model):
    from transformers.trainer_pt_utils import get_parameter_names

    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    # It also lists the biases that Llama's layers do not have.
    decaying = get_parameter_names(model, [type(model.model.norm)])
    expected = set(decaying) & set(named.values())
    assert {named[id(p)] for p in decayed["params"]} == expected
    assert {named[id(p)] for p in plain["params"]} == set(named.values()) - expected


def test_frozen_parameters_are_not_trained(model):
    model.lm_head.weight.requires_grad_(False)
    try:
        ids = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
        assert id(model.lm_head.weight) not in ids
    finally:
        model.lm_head.weight.requires_grad_(True)


def test_names_follow_the_optimizer(model):
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1))
    names = parameter_names(model, optimizer)
    parameters = dict(model.named_parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(names) == sorted(parameters)
    assert all(parameters[name] is p for name, p in zip(names, held, strict=True))


@pytest.mark.parametrize(("steps", "warmup"), [(1000, 100), (50, 2), (20, 0)])
def test_the_schedule_is_transformers_cosine_that_ends_at_a_tenth(steps, warmup):
    from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs: LambdaLR = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup, steps, min_lr_rate=0.1
    )
    factor = theirs.lr_lambdas[0]
    for step in range(1, steps + 1):
        assert learning_rate(step, steps, warmup, 3e-4) == pytest.approx(3e-4 * factor(step))


def test_the_schedule_hits_its_marks():
    assert learning_rate(1, 1000, 100, 1.0) == pytest.approx(0.01)
    assert learning_rate(100, 1000, 100, 1.0) == 1.0
    assert learning_rate(550, 1000, 100, 1.0) == pytest.approx(0.55)
    assert learning_rate(1000, 1000, 100, 1.0) == pytest.approx(0.1)
    assert learning_rate(1100, 1000, 100, 1.0) == pytest.approx(0.1)


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    assert [learning_rate(step, 4, 8, 1.0) for step in (1, 4)] == [0.125, 0.5]


def test_every_group_gets_the_rate():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 1.0} for weight in weights])
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
