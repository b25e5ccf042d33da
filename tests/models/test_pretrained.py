"""Trained weights by name, torchvision's and timm's.

Run: python -m pytest tests/models/test_pretrained.py
"""

import dataclasses
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torchvision
from building import build, parameters
from places import ROOT
from torchvision.models import vision_transformer

from split_affinity.errors import UserError
from split_affinity.models.cost import measure_model
from split_affinity.models.pretrained import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    find_weights,
    imagenet_classes,
    impatient,
    load_torchvision,
)
from split_affinity.models.registry import (
    WITH_HEADS,
    build_model,
    check_input_shape,
    check_model_name,
)
from split_affinity.models.weights import classifier_weights, take_weights
from split_affinity.options.settings import Settings
from split_affinity.runs.starting_weights import load_named_weights

# Trained weights by name


def with_weights(name, classes=1000, size=64):
    """A model of ours that has its weights by name."""
    model = build_model(name, classes, size)
    left_out = () if classes == 1000 else classifier_weights(name, classes, size)
    take_weights(model, find_weights(name, "DEFAULT").load(), left_out)
    return model.eval()


@pytest.mark.parametrize(
    "name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "mnasnet0_5", "densenet121"]
)
def test_logits_with_weights_by_name_are_torchvisions(name, torch_cache):
    path = torch_cache(name)
    if name == "densenet121":  # the file has names from before, and no counts of batches
        state = {key: value for key, value in torch.load(path).items() if value.ndim}
        dotted = {re.sub(r"(denselayer.*(?:norm|conv))(?=[12])", r"\1.", key): key for key in state}
        assert len(dotted.keys() - state.keys()) == 58 * (2 * 4 + 2)
        torch_cache(name, {old: state[new] for old, new in dotted.items()})
    theirs = torchvision.models.get_model(name, weights="DEFAULT").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        logits = with_weights(name)(images)
        assert torch.equal(logits, theirs(images))
    assert logits[0].std() > 0


def test_loaded_weights_are_those_of_the_file(torch_cache):
    state = torch.load(torch_cache("resnet18"))
    model = with_weights("resnet18", classes=7)
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, value in own.items():
        assert name.startswith("fc.") or torch.equal(value, state[name]), name
    assert own["fc.weight"].shape == (7, 512)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_weights_for_values_from_minus_one_to_one(name, size, torch_cache):
    """torchvision's model makes them of ImageNet's mean and deviation; the same up to rounding."""
    torch_cache(name)
    theirs = torchvision.models.get_model(name, weights="DEFAULT").eval()
    pixels = torch.rand(2, 3, size, size)
    native = find_weights(name, "DEFAULT").native

    def brought(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    with torch.inference_mode():
        expected = theirs(brought(IMAGENET_MEAN, IMAGENET_STD))
        logits = with_weights(name, size=size)(brought(native.mean, native.std))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * expected.std().item())


def test_what_weights_by_name_know():
    found = find_weights("resnet50", "DEFAULT")
    assert found.native == Preprocessing(224, 232)
    assert found == dataclasses.replace(find_weights("resnet50", "imagenet1k_v2"), load=found.load)
    assert found.title == "ResNet50_Weights.IMAGENET1K_V2"
    assert found.classes[:2] == ("tench", "goldfish")
    assert len(found.classes) == 1000
    other = find_weights("vit_b_16", "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1").native
    assert other == Preprocessing(384, 384, "bicubic")
    assert find_weights("vgg16", "IMAGENET1K_FEATURES").classes == ()
    means = find_weights("efficientnet_v2_l", "DEFAULT").native.mean
    assert means == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_all_weights_of_torchvision_are_found(name):
    for weights in torchvision.models.get_model_weights(name):
        native, ready = find_weights(name, weights.name).native, weights.transforms()
        assert [native.image_size] == ready.crop_size
        assert [native.val_resize] == ready.resize_size
        assert native.interpolation == ready.interpolation.value
        own = name in WITH_HEADS
        assert (list(native.mean), list(native.std)) == (
            ([0.5] * 3, [0.5] * 3) if own else (ready.mean, ready.std)
        )


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        ("resnet50", "V2", "--weights V2: resnet50 has IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
        ("resnet18", "IMAGENET1K_V2", "--weights IMAGENET1K_V2: resnet18 has IMAGENET1K_V1, DEF"),
        ("resnet18", "ResNet50_Weights.DEFAULT", "_Weights.DEFAULT: resnet18 has IMAGENET1K_V1"),
        ("resnet56", "DEFAULT", "--weights DEFAULT: resnet56 has no weights by name; --init-from"),
    ],
)
def test_weights_that_a_model_does_not_have(model, name, message):
    with pytest.raises(UserError, match=message):
        find_weights(model, name)
    with pytest.raises(UserError, match=f"^--teacher-weights {name}: "):
        find_weights(model, name, "--teacher-weights")


def test_weights_that_cannot_be_fetched(torch_cache, tmp_path):
    with pytest.raises(UserError) as caught:
        find_weights("resnet18", "DEFAULT").load()
    place = tmp_path / "torch/hub/checkpoints/resnet18-f37072fd.pth"
    assert str(caught.value) == (
        "--weights DEFAULT: cannot fetch https://download.pytorch.org/models/resnet18-f37072fd.pth:"
        f" <urlopen error no network>; if you have it from elsewhere, put it there as {place}"
    )


def test_a_training_without_a_network_has_two_other_ways(torch_cache):
    settings = Settings(model="squeezenet1_1", weights="DEFAULT", num_classes=3, image_size=32)
    ways = "; or give a file with weights by --init-from, or train without any by --recipe scratch"
    for test_only in (False, True):
        settings = dataclasses.replace(settings, test_only=test_only)
        with pytest.raises(UserError, match="cannot fetch .*squeezenet") as caught:
            load_named_weights(torch.nn.Identity(), settings, ("a", "b", "c"))
        assert str(caught.value).endswith(ways) != test_only


def test_connections_are_given_up(monkeypatch):
    before = socket.getdefaulttimeout()
    with impatient():
        assert socket.getdefaulttimeout() == 20
    assert socket.getdefaulttimeout() == before


def test_weights_whose_hash_is_wrong(torch_cache, monkeypatch):
    """torchvision compares it with the one in the file's name."""
    hashes = []

    def fetch(url, path, hash_prefix, progress):
        hashes.append(hash_prefix)
        raise RuntimeError('invalid hash value (expected "f37072fd", got "0")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(UserError, match="cannot fetch .*: invalid hash value"):
        find_weights("resnet18", "DEFAULT").load()
    assert hashes == ["f37072fd"]


class RunsCode:
    """A pickle that would make a file."""

    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100_000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("<html>Not found</html>"),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"epoch": 3}, path),
        lambda path: torch.save({"fc.weight": RunsCode()}, path),
    ],
)
def test_a_cached_file_without_weights(torch_cache, spoil, in_tmp):
    path = torch_cache("squeezenet1_1")
    spoil(path)
    message = f"--weights DEFAULT: {path} holds no weights: .+; it is fetched anew once it is gone$"
    with pytest.raises(UserError, match=message) as caught:
        find_weights("squeezenet1_1", "DEFAULT").load()
    assert "\n" not in str(caught.value)
    assert not list(in_tmp.iterdir()), "nothing ran"


def loaded(state, image_size=None):
    """What is loaded of a file with such a content."""
    weights = SimpleNamespace(url="https://a/b.pth", get_state_dict=lambda **options: dict(state))
    return load_torchvision(weights, "--weights A", image_size)


def test_weights_that_are_no_numbers_are_left_out():
    """vgg16's IMAGENET1K_FEATURES have a classifier of NaN."""
    state = {"features": torch.ones(2), "classifier": torch.full((2,), torch.nan)}
    assert loaded(state).keys() == {"features"}


def test_positions_of_a_transformer_are_interpolated():
    def transformer(size):
        return vision_transformer.VisionTransformer(size, 8, 1, 2, 16, 32)

    small, large = transformer(32), transformer(64)
    taken = loaded(small.state_dict(), 64)
    large.load_state_dict(taken)
    expected = vision_transformer.interpolate_embeddings(64, 8, small.state_dict())
    assert torch.equal(large.encoder.pos_embedding, expected["encoder.pos_embedding"])
    assert large.encoder.pos_embedding.shape == (1, 65, 16)
    for size in (None, 32):
        same = loaded(small.state_dict(), size)
        assert torch.equal(same["encoder.pos_embedding"], small.encoder.pos_embedding)


# timm's models


@pytest.fixture
def timm():
    """The package, which is not imported before a test needs it."""
    return pytest.importorskip("timm")


@pytest.fixture
def timm_cache(timm, tmp_path, monkeypatch):
    """Puts random weights of one of timm's models into a cache of Hugging Face's; there is no
    network. Returns the path of the file.
    """
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(name, **others):
        folder = tmp_path / "hub" / f"models--timm--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("1234")
        path = folder / "snapshots/1234/model.safetensors"
        path.parent.mkdir(parents=True)
        torch.manual_seed(1)
        save_file(timm.create_model(name).state_dict(), path)
        return path

    save_file = pytest.importorskip("safetensors.torch").save_file
    return put


@pytest.mark.slow
def test_timm_is_not_imported_unless_it_is_asked_for():
    code = "import sys, train_split_affinity; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_a_model_of_timm_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    message = r"^a model timm/NAME needs the package timm \(.+\): pip install timm$"
    with pytest.raises(UserError, match=message):
        check_model_name("timm/resnet18")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm/test_resnet", 64),
        ("timm/test_resnet.r160_in1k", 64),
        ("timm/test_vit", 64),
        ("timm/test_vit", 96),
        ("timm/test_convnext", 64),
    ],
)
def test_a_model_of_timm_maps_images_to_logits(timm, name, size):
    check_model_name(name)
    model = build(name, 7, size)
    assert model.training
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)
    assert measure_model(name, 7, size).parameters == parameters(model)
    assert classifier_weights(name, 7, size) == {
        name for name, value in model.state_dict().items() if value.shape[:1] == (7,)
    }
    check_input_shape(model, name, 2, size)


def test_timms_models_are_timms(timm):
    model = build("timm/test_resnet", 7)
    torch.manual_seed(0)
    theirs = timm.create_model("test_resnet", num_classes=7)
    assert model.state_dict().keys() == theirs.state_dict().keys()
    for value, expected in zip(
        model.state_dict().values(), theirs.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet81", "--model timm/resnet81: unknown to timm; did you mean resnet18"),
        ("timm/###", "--model timm/###: unknown to timm; any name of timm.list_models"),
        ("timm/test_vit.a1", "--model timm/test_vit.a1: weights unknown to timm, which has r160_"),
        ("timm/", "--model timm/: unknown to timm"),
    ],
)
def test_a_model_that_timm_does_not_have(timm, name, message):
    with pytest.raises(UserError, match=message):
        check_model_name(name)


def test_what_weights_of_timm_know(timm):
    found = find_weights("timm/resnet18", "DEFAULT")
    assert found.native == Preprocessing(224, 235, "bicubic")
    assert found.title == "timm/resnet18.a1_in1k"
    assert found.classes == imagenet_classes()
    tagged = find_weights("timm/resnet18.tv_in1k", "DEFAULT")
    assert tagged.native == Preprocessing(224, 256, "bilinear")
    assert tagged.title == "timm/resnet18.tv_in1k"
    assert find_weights("timm/resnet18", "tv_in1k").native == tagged.native
    vit = find_weights("timm/vit_base_patch16_384", "augreg_in21k_ft_in1k").native
    assert vit == Preprocessing(384, 384, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    large = find_weights("timm/vit_base_patch16_224", "augreg_in21k").classes
    assert (len(large), large[1]) == (21843, "n00005787")
    assert find_weights("timm/vit_small_patch16_224", "dino").classes == ()
    with pytest.raises(UserError, match="^--weights V1: timm/test_vit has r160_in1k$"):
        find_weights("timm/test_vit", "V1")


@pytest.mark.parametrize(
    ("name", "size"), [("test_resnet", None), ("test_vit", None), ("test_vit", 96)]
)
def test_logits_with_weights_of_timm_are_timms(timm, timm_cache, name, size):
    """Positions of a transformer are those that timm makes for the image size."""
    timm_cache(f"{name}.r160_in1k")
    options = {"img_size": size} if size else {}
    theirs = timm.create_model(name, pretrained=True, **options).eval()
    model = build_model(f"timm/{name}", 1000, size or 160)
    take_weights(model, find_weights(f"timm/{name}", "DEFAULT", image_size=size).load())
    images = torch.randn(2, 3, size or 160, size or 160)
    with torch.inference_mode():
        assert torch.equal(model.eval()(images), theirs(images))


def test_weights_of_timm_that_cannot_be_had(timm, timm_cache, tmp_path):
    place = tmp_path / "hub/models--timm--test_vit.r160_in1k"
    message = (
        f"^--weights DEFAULT: cannot load timm/test_vit.r160_in1k: .+ put it there as {place}$"
    )
    with pytest.raises(UserError, match=message):
        find_weights("timm/test_vit", "DEFAULT").load()
    path = timm_cache("test_vit.r160_in1k")
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UserError, match=message):
        find_weights("timm/test_vit", "DEFAULT").load()
