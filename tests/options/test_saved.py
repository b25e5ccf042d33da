"""What a checkpoint brings of its settings. Run: python -m pytest tests/options/test_saved.py"""

from split_affinity.options.saved import settings_left


def test_loaders_that_the_machine_decided_on_are_not_typed_again():
    assert settings_left({"workers": 9, "mirror": None}, {}) == ["workers"]
    assert settings_left({"workers": 16}, {"workers": None}) == []
    assert settings_left({"workers": 2}, None) == [], "of an earlier version"
    assert settings_left({"workers": 0}, {"lr": None}) == ["workers"]
