"""Models. Run: python -m pytest tests/test_models.py"""

import pytest
import torch

import train_split_affinity as tsa


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 32), ("vit_b_32", 64), ("googlenet", 64), ("swin_t", 64)],
)
def test_a_model_maps_images_to_logits(name, size):
    torch.manual_seed(0)
    model = tsa.build_model(name, num_classes=7, image_size=size)
    assert model.training
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_resnet50_is_torchvisions():
    model = tsa.build_model("resnet50", num_classes=1000, image_size=224)
    assert sum(weight.numel() for weight in model.parameters()) == 25_557_032


def test_an_unknown_model_gets_the_nearest_names():
    with pytest.raises(tsa.UserError, match=r"--model resnet5: unknown; did you mean resnet50"):
        tsa.check_model_name("resnet5")
    with pytest.raises(tsa.UserError, match="any torchvision classifier"):
        tsa.check_model_name("###")
    with pytest.raises(tsa.UserError, match="fcn_resnet50: unknown"):  # no classifier
        tsa.check_model_name("fcn_resnet50")


@pytest.mark.parametrize(
    ("name", "batch", "size"),
    [("alexnet", 2, 16), ("inception_v3", 2, 32), ("resnet18", 1, 32)],
)
def test_batches_that_a_model_cannot_train_on(name, batch, size):
    model = tsa.build_model(name, num_classes=3, image_size=size)
    with pytest.raises(tsa.UserError, match=f"--batch-size {batch} --image-size {size}: {name}"):
        tsa.check_input_shape(model, name, batch, size)


def test_an_image_size_that_a_transformer_cannot_be_built_for():
    with pytest.raises(tsa.UserError, match="--image-size 50, maxvit_t"):
        tsa.build_model("maxvit_t", num_classes=3, image_size=50)


def test_checking_the_shape_leaves_the_model_alone():
    model = tsa.build_model("resnet18", num_classes=3, image_size=64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tsa.check_input_shape(model, "resnet18", 2, 64)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
