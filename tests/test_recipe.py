"""Recipe. Run: python -m pytest tests/test_recipe.py"""

import torch

import train_split_affinity as tsa


def test_the_optimizer_takes_its_rates_from_the_settings():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    settings = tsa.Settings(lr=0.3, momentum=0.8, weight_decay=0.01)
    (group,) = tsa.build_optimizer(model, settings).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.8, 0.01)
    assert [id(weight) for weight in group["params"]] == [id(w) for w in model.parameters()]
