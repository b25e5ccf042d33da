"""Models of our own and of libraries. Run: python -m pytest tests/models/test_models.py"""

import copy

import pytest
import torch
import torchvision
from building import build, parameters
from small import as_loaded, needs_two_cpus
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from split_affinity import ALLOWED_CPUS
from split_affinity.data.loader import Batches
from split_affinity.errors import UserError, memory_errors
from split_affinity.lanes.lane import Lanes
from split_affinity.machine.plan import CorePlan, Group
from split_affinity.models.cost import measure_model
from split_affinity.models.freezing import begin_training, freeze, trainable_weights
from split_affinity.models.own import ChannelAttention, PadShortcut, TokenEncoder
from split_affinity.models.registry import (
    build_model,
    check_input_shape,
    check_model_name,
    classifier_names,
)
from split_affinity.models.weights import classifier_weights
from split_affinity.options.settings import Settings
from split_affinity.training.network import Network
from split_affinity.training.optimizer import build_optimizer
from split_affinity.training.schedules import SCHEDULES, sequential
from split_affinity.training.update import TrainState

OWN = ("resnet20", "resnet56", "hybrid", "hybrid-light", "hybrid-heavy")
HYBRIDS = OWN[1:]


def on_meta(name, classes, size):
    """A model that computes shapes alone."""
    with torch.device("meta"):
        return build_model(name, classes, size)


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 32), ("vit_b_32", 64), ("googlenet", 64), ("swin_t", 64)],
)
def test_a_model_maps_images_to_logits(name, size):
    model = build(name, 7, size)
    assert model.training
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_torchvisions_models_are_torchvisions():
    model = build("resnet18", 7, 224)
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=7, zero_init_residual=True)
    assert type(model) is type(theirs)
    for (name, value), expected in zip(
        model.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize(
    ("name", "classes", "size", "count"),
    [
        ("resnet50", 1000, 224, 25_557_032),
        ("resnet20", 10, 32, 269_722),  # table 6 of He et al. 2016 says 0.27 M
        ("resnet56", 10, 32, 853_018),  # and 0.85 M
        ("hybrid", 1000, 224, 53_148_968),
        ("hybrid-light", 1000, 224, 14_744_840),
        ("hybrid-heavy", 1000, 224, 116_345_544),
    ],
)
def test_how_many_parameters(name, classes, size, count):
    assert parameters(on_meta(name, classes, size)) == count


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("name", OWN)
def test_own_models_at_all_sizes(name, size):
    model = build(name, 10, size)
    logits = model(torch.randn(2, 3, size, size))
    assert model.training
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


def shapes_of(model, parts, images):
    """The shapes (channels, height, width) that parts of a model give for images."""
    shapes = []
    for part in parts:
        part.register_forward_hook(lambda module, args, output: shapes.append((*output.shape[1:],)))
    model(images)
    return shapes


def test_the_stages_of_resnet56():
    model = build("resnet56")
    parts = [model.stem, model.stage1, model.stage2, model.stage3]
    assert shapes_of(model, parts, torch.randn(2, 3, 32, 32)) == [
        (16, 32, 32),
        (16, 32, 32),
        (32, 16, 16),
        (64, 8, 8),
    ]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 55, "with the last layer 56: none belongs to a shortcut"
    assert {module.kernel_size for module in convolutions} == {(3, 3)}


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("hybrid", (64, 128, 256, 512)),
        ("hybrid-light", (32, 64, 128, 256)),
        ("hybrid-heavy", (96, 192, 384, 768)),
    ],
)
def test_the_stages_of_a_hybrid(name, channels):
    model = on_meta(name, 10, 224)
    images = torch.empty(2, 3, 224, 224, device="meta")
    parts = [model.stem, *model.stages, model.attention]
    assert shapes_of(model, parts, images) == [
        (channels[0], 56, 56),
        (channels[1], 28, 28),
        (channels[2], 14, 14),
        (channels[3], 7, 7),
        (channels[3], 7, 7),
    ]


@pytest.mark.parametrize(
    ("name", "blocks", "width"),
    [("hybrid", 4, 768), ("hybrid-light", 2, 384), ("hybrid-heavy", 6, 1024)],
)
def test_the_transformer_of_a_hybrid(name, blocks, width):
    encoder = on_meta(name, 10, 224).encoder
    assert encoder.positions.shape == (1, width, 7, 7)
    assert len(encoder.blocks) == blocks
    for block in encoder.blocks:
        assert isinstance(block, nn.TransformerEncoderLayer)
        assert block.self_attn.num_heads == 8
        assert block.linear1.out_features == 4 * width
        assert block.activation is nn.functional.gelu
        assert not block.norm_first
        assert {block.dropout.p, block.dropout1.p, block.dropout2.p} == {0.1}


def layers(module):
    """Its layers in short, with the widths of linear layers and the shares of dropout."""
    figures = {nn.Linear: "out_features", nn.LayerNorm: "normalized_shape", nn.Dropout: "p"}
    return [
        (type(layer).__name__, getattr(layer, figures[type(layer)]))
        if type(layer) in figures
        else type(layer).__name__
        for layer in module
    ]


def test_embedding_and_head_of_a_hybrid():
    model = on_meta("hybrid", 1000, 224)
    assert model.embedding[2].in_features == 8192
    assert layers(model.embedding) == [
        "AdaptiveAvgPool2d",
        "Flatten",
        ("Linear", 2048),
        ("LayerNorm", (2048,)),
        "ReLU",
        ("Dropout", 0.1),
        ("Linear", 768),
    ]
    assert layers(model.head) == [
        ("Linear", 512),
        ("LayerNorm", (512,)),
        "ReLU",
        ("Dropout", 0.2),
        ("Linear", 256),
        "ReLU",
        ("Dropout", 0.1),
        ("Linear", 1000),
    ]


def test_the_head_sees_the_mean_of_the_tokens():
    model = build("hybrid-light", 10, 64)
    seen = []
    model.encoder.register_forward_hook(lambda module, args, output: seen.append(output.mean(1)))
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.randn(2, 3, 64, 64))
    assert torch.equal(*seen)


def test_a_shortcut_picks_pixels_and_adds_channels_of_zeros():
    images = torch.arange(50.0).view(1, 2, 5, 5)
    assert PadShortcut(2, 4, stride=2)(images).tolist() == [
        [
            [[0, 2, 4], [10, 12, 14], [20, 22, 24]],
            [[25, 27, 29], [35, 37, 39], [45, 47, 49]],
            [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
            [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
        ]
    ]


def test_channel_attention_sees_average_and_maximum_of_each_channel():
    attention = ChannelAttention(4)
    seen = []
    attention.gate[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features = torch.zeros(1, 4, 2, 2)
    features[0, 1] = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    features[0, 3] = torch.tensor([[-1.0, -1.0], [-5.0, -1.0]])
    attention(features)
    assert seen[0].flatten().tolist() == [0, 3, 0, -2, 0, 6, 0, -1]


def test_channel_attention_scales_whole_channels():
    attention = ChannelAttention(4)
    gates = torch.tensor([-30.0, 0.0, 1.0, 30.0])
    nn.init.zeros_(attention.gate[2].weight)
    attention.gate[2].bias.data.copy_(gates)
    features = torch.ones(2, 4, 3, 5)
    scaled = attention(features)
    assert scaled.shape == (2, 4, 3, 5)
    for image in scaled:
        for channel, expected in zip(image, (0, 0.5, 0.7310586, 1), strict=True):
            torch.testing.assert_close(channel, torch.full((3, 5), float(expected)))


def encode(encoder, side, embedding=0.0):
    """Tokens, as rows of places, of a feature map that adds nothing to the positions."""
    width = encoder.positions.shape[1]
    nn.init.zeros_(encoder.project.weight)
    nn.init.zeros_(encoder.project.bias)
    features = torch.randn(1, encoder.project.in_channels, side, side)
    tokens = encoder(features, torch.full((1, width), embedding))
    assert tokens.shape == (1, side * side, width)
    return tokens[0, :, 0].view(side, side)


def small_encoder():
    """Without blocks, with positions 0 to 3 on a grid of two by two places."""
    encoder = TokenEncoder(channels=3, width=8, blocks=0, grid=2)
    encoder.positions.data.copy_(torch.arange(4.0).view(1, 1, 2, 2).expand(1, 8, 2, 2))
    return encoder


def test_tokens_have_positions_and_the_embedding_of_the_image():
    assert encode(small_encoder(), 2).tolist() == [[0, 1], [2, 3]]
    assert encode(small_encoder(), 2, embedding=10.0).tolist() == [[10, 11], [12, 13]]


def test_positions_are_interpolated_for_other_sizes():
    """A cubic (a = -0.75) through 0 and 1, read at -1/6, 1/2 and 7/6, in both directions."""
    expected = torch.tensor(
        [
            [-0.260417, 0.326389, 0.913194],
            [0.913194, 1.500000, 2.086806],
            [2.086806, 2.673611, 3.260417],
        ]
    )
    torch.testing.assert_close(encode(small_encoder(), 3), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "grid"), [(32, 1), (33, 2), (64, 2), (200, 7), (224, 7)])
def test_positions_are_made_for_the_size_of_the_images(size, grid):
    """So that nothing is interpolated at that size."""
    model = on_meta("hybrid-light", 10, size)
    assert model.encoder.positions.shape[2:] == (grid, grid)
    images = torch.empty(2, 3, size, size, device="meta")
    assert shapes_of(model, [model.attention], images) == [(256, grid, grid)]


@pytest.mark.parametrize("size", [32, 50, 128, 256])
def test_a_hybrid_for_224_pixels_takes_other_sizes(size):
    model = build("hybrid-light", 10, 224)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_positions_can_be_learnt_at_other_sizes():
    model = build("hybrid-light", 10, 224)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert model.encoder.positions.grad.count_nonzero() > 0


@pytest.mark.parametrize(
    ("name", "part", "spread"),  # by hand: sqrt(2 / (channels out * kernel places))
    [
        ("resnet56", "stem.0", 0.117851),
        ("resnet56", "stage2.0.conv1", 0.083333),
        ("resnet56", "stage3.8.conv2", 0.058926),
        ("hybrid", "stem.0", 0.025254),
        ("hybrid", "stages.2.downsample.0", 0.062500),
        ("hybrid", "attention.gate.0", 0.088388),
        ("hybrid", "encoder.project", 0.051031),
    ],
)
def test_convolutions_begin_with_kaimings_spread(name, part, spread):
    weight = build(name).get_submodule(part).weight
    assert weight.std().item() == pytest.approx(spread, rel=0.08)  # stem.0 has 432 values
    assert weight.mean().item() == pytest.approx(0, abs=0.1 * spread)


@pytest.mark.parametrize(
    ("name", "blocks", "last"),
    [
        ("resnet18", 8, "bn2"),
        ("resnet50", 16, "bn3"),
        ("resnext50_32x4d", 16, "bn3"),
        ("wide_resnet50_2", 16, "bn3"),
    ],
)
def test_the_blocks_of_a_resnet_begin_as_identities(name, blocks, last):
    norms = {at: m for at, m in build(name).named_modules() if isinstance(m, nn.BatchNorm2d)}
    zero = {at for at, norm in norms.items() if norm.weight.eq(0).all()}
    assert zero == {at for at in norms if at.endswith(last) and at.startswith("layer")}
    assert len(zero) == blocks
    assert all(norm.weight.eq(1).all() for at, norm in norms.items() if at not in zero)


def branches(model, rows):
    """What the last layer of each residual branch of a ResNet gives for some rows, (rows,
    channels): 1 if it left none out.
    """
    blocks = [each for each in model.modules() if isinstance(each, BasicBlock | Bottleneck)]
    last = [each.bn3 if isinstance(each, Bottleneck) else each.bn2 for each in blocks]
    for norm in last:
        nn.init.ones_(norm.bias)
    with torch.no_grad():
        return [norm(torch.zeros(rows, norm.num_features, 1, 1)).flatten(1) for norm in last]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("resnet18", 8), ("resnet50", 16), ("resnext50_32x4d", 16), ("resnet56", 27), ("hybrid", 3)],
)
def test_blocks_of_a_resnet_are_left_out_more_often_the_deeper_they_are(name, blocks):
    """Scaled by 1 / (1 - p) where they are not, so that the mean remains."""
    torch.manual_seed(0)
    outputs = branches(build_model(name, 10, 32, stochastic_depth=0.5), 400)
    for number, output in enumerate(outputs, 1):
        probability = 0.5 * number / blocks
        left_out = output.eq(0).all(1)
        assert left_out.double().mean().item() == pytest.approx(probability, abs=0.1), number
        kept = torch.full_like(output[~left_out], 1 / (1 - probability))
        torch.testing.assert_close(output[~left_out], kept)
    assert len(outputs) == blocks


def test_every_image_is_drawn_for_itself_and_in_every_block():
    outputs = branches(build_model("resnet18", 10, 32, stochastic_depth=0.5), 64)
    drawn = torch.stack([rows.eq(0).all(1) for rows in outputs])
    assert len(drawn.unique(dim=1).T) > 30, "of 2 ** 8 combinations"


@pytest.mark.parametrize("name", ["resnet18", "resnet56"])
def test_skipping_blocks_changes_neither_names_nor_an_evaluation(name):
    torch.manual_seed(0)
    model = build_model(name, 10, 32, stochastic_depth=0.9)
    reference = build(name)
    assert list(model.state_dict()) == list(reference.state_dict())
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            nn.init.ones_(each.weight)
    reference.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), reference.eval()(images))
    model.train()
    reference.train()
    assert not torch.equal(model(images), reference(images))
    freeze(model, "body", name, 10, 32)
    freeze(reference, "body", name, 10, 32)
    reference.load_state_dict(model.state_dict())
    assert torch.equal(model(images), reference(images)), "nor what is frozen"


def test_a_copy_of_a_model_skips_blocks_too():
    model = build_model("resnet18", 10, 32, stochastic_depth=0.9)
    copied = Network(model, nn.CrossEntropyLoss()).copy()
    assert copied.layer4[1].bn2.weight is not model.layer4[1].bn2.weight
    left_out = branches(copied, 200)[-1].eq(0).all(1).double().mean().item()
    assert left_out == pytest.approx(0.9, abs=0.1)
    assert not branches(copied.eval(), 200)[-1].eq(0).any()


def own_probabilities(model):
    return [each.p for each in model.modules() if isinstance(each, torchvision.ops.StochasticDepth)]


@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_tiny"])
def test_stochastic_depth_of_torchvision_is_an_option_of_its_builders(name):
    with torch.device("meta"):
        model = build_model(name, 10, 64, stochastic_depth=0.3)
        theirs = torchvision.models.get_model(name, num_classes=10, stochastic_depth_prob=0.3)
        own = torchvision.models.get_model(name, num_classes=10)
    assert own_probabilities(model) == own_probabilities(theirs) != own_probabilities(own)
    assert own_probabilities(on_meta(name, 10, 64)) == own_probabilities(own)


@pytest.mark.parametrize(
    ("name", "layers", "default"), [("swin_t", 12, 0.2), ("maxvit_t", 32, 0.2)]
)
def test_stochastic_depth_of_builders_without_that_option(name, layers, default):
    """It rises from 0 to what was asked for, as to the default."""
    before = own_probabilities(on_meta(name, 10, 224))
    with torch.device("meta"):
        after = own_probabilities(build_model(name, 10, 224, stochastic_depth=0.3))
    assert len(before) == layers
    assert (min(before), max(before)) == (0, default)
    assert after == pytest.approx([p * 0.3 / default for p in before])


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "vit_b_32", "densenet121", "regnet_x_400mf"])
def test_models_without_blocks_to_leave_out(name):
    with pytest.raises(UserError, match=f"^--stochastic-depth 0.2: {name} has no blocks that"):
        build_model(name, 10, 64, stochastic_depth=0.2)


@pytest.mark.parametrize(
    ("name", "asked", "left"),  # what is trained
    [
        ("resnet18", "body", ["fc.weight", "fc.bias"]),
        ("squeezenet1_1", "body", ["classifier.1.weight", "classifier.1.bias"]),
        ("vit_b_32", "body", ["heads.head.weight", "heads.head.bias"]),
        ("hybrid-light", "body", ["head.7.weight", "head.7.bias"]),
        ("resnet56", "stem,stage1,stage2,fc", "stage3"),
        ("resnet56", "stage3,body", ["fc.weight", "fc.bias"]),
        ("vit_b_32", ",".join(f"encoder.layers.encoder_layer_{n}" for n in range(12)), None),
    ],
)
def test_what_is_frozen(name, asked, left):
    model = on_meta(name, 10, 32)
    names = [name for name, _ in model.named_parameters()]
    frozen = freeze(model, asked, name, 10, 32)
    if isinstance(left, str):
        left = [each for each in names if each.startswith(left)]
    left = left or [each for each in names if not each.startswith("encoder.layers.")]
    assert list(trainable_weights(model)) == left
    assert sorted(frozen) == sorted(set(names) - set(left))


def test_without_an_option_nothing_is_frozen():
    model = on_meta("resnet18", 10, 32)
    assert freeze(model, None, "resnet18", 10, 32) == ()
    assert len(trainable_weights(model)) == 62
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            "layer9",
            "--freeze layer9: resnet18 has no 'layer9'; its layer groups are conv1, bn1, layer1, "
            "layer2, layer3, layer4, fc, body (all but the classifier)",
        ),
        ("layer1,,fc", "--freeze layer1,,fc: resnet18 has no ''; its"),
        ("fc,body", "--freeze fc,body: nothing of resnet18 would be left to train"),
        (
            "conv1,bn1,layer1,layer2,layer3,layer4,fc",
            "--freeze conv1,bn1,layer1,layer2,layer3,layer4,fc: nothing of resnet18 would be",
        ),
    ],
)
def test_what_cannot_be_frozen(asked, message):
    with pytest.raises(UserError) as caught:
        freeze(on_meta("resnet18", 10, 32), asked, "resnet18", 10, 32)
    assert str(caught.value).startswith(message)


def test_modules_with_frozen_weights_alone_are_in_evaluation_mode():
    model = on_meta("hybrid-light", 10, 32)
    freeze(model, "stem,stages,embedding", "hybrid-light", 10, 32)
    for _ in range(2):
        for name, module in model.named_modules():
            part = name.partition(".")[0]
            assert module.training is (part not in ("stem", "stages", "embedding")), name
        assert not model.embedding[5].training, "dropout among them too"
        model.eval()
        begin_training(model)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_the_frozen_front_part_runs_without_a_graph(bf16, channels_last, copied):
    """Nothing is kept of it for a backward pass, by copies of the model neither."""
    model = build("resnet18")
    if channels_last:
        model.to(memory_format=torch.channels_last)
    freeze(model, "body", "resnet18", 10, 32)
    network = Network(model, nn.CrossEntropyLoss(), bf16=bf16, channels_last=channels_last)
    runs, features, kept = network.copy() if copied else model, [], []
    for name, module in runs.named_modules():
        if name and name != "fc":
            module.register_forward_hook(lambda module, args, output: features.append(output))
    buffers = copy.deepcopy(dict(model.named_buffers()))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: kept.append(each) or each, lambda each: each
    ):
        output = network.forward((torch.randn(4, 3, 32, 32), torch.zeros(4).long()), runs)
    assert len(features) > 60
    assert all(each.grad_fn is None and not each.requires_grad for each in features)
    assert {tuple(each.shape) for each in kept} <= {(4, 512), (10, 512), (512, 10)}, "of fc"
    network.backward(output)
    assert {name for name, weight in runs.named_parameters() if weight.grad is not None} == {
        "fc.weight",
        "fc.bias",
    }
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name


@pytest.mark.parametrize(("name", "count"), [("resnet56", 55), ("hybrid-light", 10)])
def test_batch_normalisation_begins_with_one_and_zero(name, count):
    norms = [module for module in build(name).modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == count
    for norm in norms:
        assert norm.weight.eq(1).all()
        assert norm.bias.eq(0).all()


@pytest.fixture
def plan():
    """Two lanes of one thread each."""
    first, second = sorted(ALLOWED_CPUS)[:2]
    groups = Group("forward", (first,), 1), Group("backward", (second,), 1)
    return CorePlan("even", *groups, groups[0].cpus)


@pytest.mark.slow
@needs_two_cpus
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_overfits_one_batch(name, plan):
    """From about 1.39, the natural logarithm of 4."""
    model = build(name, 4)
    batch = torch.randn(4, 3, 32, 32), torch.arange(4)
    settings = Settings(opt="adam", lr=3e-4, weight_decay=0.0)
    train_state = TrainState(
        Network(model, nn.CrossEntropyLoss()), build_optimizer(model, settings)
    )
    with Lanes(plan, ()) as lanes:
        *_, (scores,) = sequential(lanes, train_state, Batches(as_loaded([batch]), 12))
    assert scores.loss < 0.3
    assert scores.top1 == 4


def train_one_step(schedule, plan, model):
    """The losses of a step of two batches."""
    torch.manual_seed(1)
    batches = [(torch.randn(2, 3, 32, 32), torch.randint(0, 10, (2,))) for _ in range(2)]
    train_state = TrainState(
        Network(model, nn.CrossEntropyLoss(), 2), torch.optim.SGD(model.parameters(), 0.05)
    )
    with Lanes(plan, ()) as lanes:
        (scores,) = SCHEDULES[schedule](lanes, train_state, Batches(as_loaded(batches), 2))
    return [each.loss for each in scores]


@pytest.mark.slow
@needs_two_cpus
@pytest.mark.parametrize("name", OWN)
def test_one_step_under_each_schedule(name, plan):
    """It is the same under all: only the second step can be one of old weights."""
    model = build(name)
    losses = train_one_step("sequential", plan, model)
    begun = build(name).state_dict()
    for key, value in model.named_parameters():
        assert value.isfinite().all(), key
        assert not torch.equal(value, begun[key]), key
    for schedule in ("overlap", "delayed"):
        other = build(name)
        assert train_one_step(schedule, plan, other) == losses
        for key, value in other.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize(
    ("name", "classes", "size", "figures"),
    [
        (  # 4,089,184,256 multiplications and additions, as fvcore counts them
            "resnet50",
            1000,
            224,
            (25_557_032, 102_441_032, 8_178_368_512, 16_120_709_120),
        ),
        (  # by hand: 125,485,696 of each; none for gradients of the images
            "resnet56",
            10,
            32,
            (853_018, 3_428_768, 250_971_392, 501_058_048),
        ),
        (  # by hand: 2,098,315,264 of each, those of the attention included
            "hybrid",
            1000,
            224,
            (53_148_968, 212_617_968, 4_196_630_528, 8_157_233_152),
        ),
    ],
)
def test_what_a_model_amounts_to(name, classes, size, figures):
    measured = measure_model(name, classes, size)
    forward, backward = measured.flops["forward"], measured.flops["backward"]
    assert (measured.parameters, measured.weight_bytes, forward, backward) == figures


@pytest.mark.parametrize(
    ("frozen", "backward"),  # by hand: of the whole model, of fc alone, and of layer4 too
    [
        (None, 2 * 3_627_132_928 - 2 * 112**2 * 64 * 49 * 3),  # none goes below the first layer
        ("body", 2 * 512 * 10),
        # 3 x 3 of 512 channels at 7 x 7: the first halves the side of 256, and none goes below it
        (
            "conv1,bn1,layer1,layer2,layer3",
            2 * (2 * 512 * 10) + 2 * 49 * 512 * (9 * 256 + 256) + 4 * 3 * 49 * 512 * 9 * 512,
        ),
    ],
)
def test_the_work_of_a_model_with_frozen_weights(frozen, backward):
    figures = measure_model("resnet18", 10, 224, frozen)
    assert figures.parameters == 11_181_642
    assert figures.flops["forward"] == 3_627_132_928
    assert figures.flops["backward"] == backward


def test_a_model_that_computes_its_widths_with_tensors_is_measured():
    """RegNets do, when they are built: torchvision says what they amount to."""
    measured = measure_model("regnet_x_400mf", 1000, 224)
    told = torchvision.models.RegNet_X_400MF_Weights.IMAGENET1K_V1.meta
    assert measured.parameters == told["num_params"]
    assert measured.flops["forward"] / 2e9 == pytest.approx(told["_ops"], abs=0.001)


@pytest.mark.parametrize("name", OWN)
def test_own_models_have_names(name):
    assert name in classifier_names()
    check_model_name(name)


def test_an_unknown_model_gets_the_nearest_names():
    with pytest.raises(UserError, match=r"--model resnet5: unknown; did you mean resnet56,"):
        check_model_name("resnet5")
    with pytest.raises(UserError, match="did you mean hybrid"):
        check_model_name("hybird")
    with pytest.raises(UserError, match="any torchvision classifier"):
        check_model_name("###")
    with pytest.raises(UserError, match="fcn_resnet50: unknown"):  # no classifier
        check_model_name("fcn_resnet50")


@pytest.mark.parametrize(
    ("name", "batch", "size"),
    [("alexnet", 2, 16), ("inception_v3", 2, 32), ("resnet18", 1, 32), ("hybrid-light", 1, 32)],
)
def test_batches_that_a_model_cannot_train_on(name, batch, size):
    model = build_model(name, num_classes=3, image_size=size)
    with pytest.raises(UserError, match=f"--batch-size {batch} --image-size {size}: {name}"):
        check_input_shape(model, name, batch, size)


def test_batches_that_no_number_can_count():
    with pytest.raises(UserError, match="--image-size 2147483647: alexnet cannot train"):
        check_input_shape(build_model("alexnet", 3, 32), "alexnet", 2, 2**31 - 1)


@pytest.mark.parametrize("size", [8, 2**31 - 1])
def test_a_model_that_cannot_be_measured(size):
    with pytest.raises(UserError, match=f"--image-size {size}: alexnet cannot train"):
        measure_model("alexnet", 3, size)


FAILED = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 409600000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError(FAILED + "\nframe #0"), FAILED.partition("DefaultCPUAllocator: ")[2]),
        (OSError(12, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
    ],
)
def test_memory_that_cannot_be_had_is_one_line(error, reason):
    with pytest.raises(UserError) as caught, memory_errors():
        raise error
    assert str(caught.value) == (
        f"not enough memory: {reason}; lower --batch-size, --image-size or --num-classes"
    )


@pytest.mark.parametrize("error", [RuntimeError("other"), OSError(28, "No space"), ValueError()])
def test_other_errors_are_no_matter_of_memory(error):
    with pytest.raises(type(error)) as caught, memory_errors():
        raise error
    assert caught.value is error


def test_a_model_without_room_is_not_blamed_on_the_image_size(monkeypatch):
    def no_room(*args, **options):
        raise RuntimeError(FAILED)

    monkeypatch.setattr(torchvision.models, "get_model", no_room)
    with pytest.raises(UserError, match="^not enough memory: can't allocate memory: you tried"):
        build_model("resnet18", 3, 32)


@pytest.mark.parametrize("name", ["vit_b_32", "maxvit_t"])
def test_transformers_that_cannot_grow_with_the_images(name):
    model = build_model(name, num_classes=3, image_size=224)
    with pytest.raises(UserError, match=f"--image-size 128: {name} cannot train"):
        check_input_shape(model, name, 2, 128)


def test_an_image_size_that_a_transformer_cannot_be_built_for():
    with pytest.raises(UserError, match="--image-size 50, maxvit_t"):
        build_model("maxvit_t", num_classes=3, image_size=50)


@pytest.mark.parametrize("name", ["resnet18", "resnet56", "hybrid-light"])
def test_checking_the_shape_leaves_the_model_alone(name):
    model = build_model(name, num_classes=3, image_size=64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    check_input_shape(model, name, 2, 64)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("resnet18", {"fc.weight", "fc.bias"}),
        ("squeezenet1_1", {"classifier.1.weight", "classifier.1.bias"}),
        ("vit_b_32", {"heads.head.weight", "heads.head.bias"}),
        ("hybrid-light", {"head.7.weight", "head.7.bias"}),
    ],
)
def test_the_weights_of_the_classifier(model, weights):
    assert classifier_weights(model, 7, 224) == weights
