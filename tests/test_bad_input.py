"""Bad input ends in one line. Run: python -m pytest tests/test_bad_input.py"""

import os

import pytest
from places import SCRIPT
from processes import run_script
from small import TINY

from split_affinity import ALLOWED_CPUS
from train_split_affinity import main

ANY = str(min(ALLOWED_CPUS))


BAD_INPUT = [
    (["--forward-cores", ""], "--forward-cores: '' is not a core list"),
    (["--forward-cores", "3-1"], "'3-1' runs backwards"),
    (["--forward-cores", "0,0"], "names CPU 0 twice"),
    (["--forward-cores", "x"], "'x' is not a core list"),
    (["--forward-cores", ANY, "--backward-cores", ANY], f"overlap in {ANY}"),
    (["--forward-cores", ANY, "--backward-cores", "9999"], "CPU 9999 is not in this machine"),
    (["--forward-cores", ANY], f"--forward-cores {ANY} needs --backward-cores"),
    (["--loader-cores", "9999"], "CPU 9999 is not in this machine (allowed: "),
    (["--split", "0:1"], "--split: '0:1' leaves a group without cores"),
    (["--split", "2"], "'2' is not even, auto, none, or forward:backward"),
    (["--split", "a:b"], "'a:b' is not even, auto, none, or forward:backward"),
    (["--batch-size", "0"], "--batch-size: '0' is not a whole number from 1"),
    (["-b", "x"], "-b/--batch-size: 'x' is not a whole number from 1"),
    (["--steps", "-1"], "--steps: '-1' is not a whole number from 1"),
    (["--forward-threads", "0"], "--forward-threads: '0' is not a whole number from 1"),
    (["--image-size", "2.5"], "--image-size: '2.5' is not a whole number from 1"),
    (["--lr", "nan"], "--lr: 'nan' is not a number of 0 or more"),
    (["--model", "resnet5"], "--model resnet5: unknown; did you mean resnet56, resnet50"),
    (["--num-classes", "1"], "--num-classes: '1' is not a whole number from 2"),
    (["--num-classes", "2147483647"], "'2147483647' is not a whole number from 2 to 10000000"),
    (
        ["--model", "resnet18", "--num-classes", "9999999", "--lr", "0", "--image-size", "99999"],
        "32 images of 99999 px, resnet18 with 9999999 classes: at least 7",
    ),
    (["find-lr", *TINY, "--image-size", "99999"], "2 images of 99999 px, squeezenet1_1 with 3 "),
    (["compare", *TINY, "--image-size", "99999"], "8 images of 99999 px, squeezenet1_1 with 3 "),
    (["compare", *TINY, "--accumulate", "65536", "--image-size", "999"], "131072 images of 999 "),
    ([*TINY, "--accumulate", "1000000"], "at most 131072 synthetic ones are allowed"),
    (["plan", "--image-size", "2147483647"], "--image-size 2147483647: resnet50 cannot train on "),
    (["--std", "1e-320,1,1"], "--std: '1e-320' is not from 0.001 to 1"),
    (["--std", "1e-45,1,1"], "--std: '1e-45' is not from 0.001 to 1"),
    (["--color-jitter", "1e300"], "--color-jitter: '1e300' is not a number from 0 to 1000"),
    (["--timeout", "1e7"], "--timeout: '1e7' is not above 0 and up to 1000000"),
    (["--timeout", "0"], "--timeout: '0' is not above 0 and up to 1000000"),
    (["--steps", "5", "plan"], "arguments: plan; the command comes first: plan --steps 5"),
    (["-b", "2", "predict", "a.jpg"], "the command comes first: predict -b 2 a.jpg"),
    (["--optimzer", "adam"], "arguments: --optimzer adam; did you mean --opt?"),
    (["--learning_rate", "1"], "arguments: --learning_rate 1; did you mean --lr?"),
    (
        ["--network", "a", "--batchsize", "1"],
        "; did you mean --model for --network, --batch-size for --",
    ),
    (["--hflip", "2"], "--hflip: '2' is not a number from 0 to 1"),
    (["--mixup-alpha", "1e-300"], "--mixup-alpha: '1e-300' is not 0, or from 0.01 to 1000"),
    (["--cutmix-alpha", "1e-300"], "--cutmix-alpha: '1e-300' is not 0, or from 0.01 to 1000"),
    (["--subset", "0"], "--subset: '0' is not above 0 and up to 1"),
    (["--target-top1", "101"], "--target-top1: '101' is not above 0 and up to 100"),
    (["--ra-magnitude", "31"], "--ra-magnitude: '31' is not a whole number from 0 to 30"),
    (["--norm-weight-decay", "-1"], "--norm-weight-decay: '-1' is not a number of 0 or more"),
    (
        ["--bias-weight-decay", "0", "--skip-decay-1d"],
        "--bias-weight-decay 0.0 and --skip-decay-1d",
    ),
    (["--lr-milestones", "60,30"], "'60,30' is not a list of ascending epochs such as 30,60,80"),
    (["--opt", "lion"], "--opt: invalid choice: 'lion'"),
    (["--lr-scheduler", "linear"], "--lr-scheduler: invalid choice: 'linear'"),
    (["--auto-augment", "xx"], "--auto-augment: invalid choice: 'xx'"),
    (["--recipe", "imagnet"], "--recipe: invalid choice: 'imagnet'"),
    (["--recipe", "imagenet-full"], "starts from trained weights: give --init-from PATH"),
    (["--recipe", "imagenet-subset", "--subset", "0.2"], "--subset 0.2 needs --data-path"),
    (
        ["--recipe", "imagenet", "--epochs", "3", "--lr-warmup-epochs", "5"],
        "--lr-warmup-epochs 5: fewer than --epochs 3",
    ),
    (["--subset", "0.5"], "--subset 0.5 needs --data-path"),
    (["--download"], "--download needs --data-path"),
    (["--min-res", "128"], "--min-res and --end-ramp belong together"),
    (["--max-res", "128"], "--max-res 128 needs --min-res"),
    (["--min-res", "100", "--end-ramp", "3"], "multiples of 32 are allowed"),
    (["--lr-warmup-epochs", "3"], "--lr-warmup-epochs 3 needs --epochs"),
    (
        ["--recipe", "hybrid", "--lr", "1e-7", "--min-lr", "1e-6"],
        "--min-lr 1e-06 is above the learning rate, 1e-07",
    ),
    (["--freeze-epochs", "3", "--epochs", "4"], "--freeze-epochs 3 needs --freeze\n"),
    (["--freeze-epochs", "3", "--freeze", "body"], "--freeze-epochs 3 needs --epochs\n"),
    (
        [*TINY, "--freeze", "features.3,body,x"],
        "--freeze features.3,body,x: squeezenet1_1 has no 'x'; its layer groups are features.0, ",
    ),
    ([*TINY, "--freeze", ""], "--freeze : squeezenet1_1 has no ''; its layer groups are features"),
    (["plan", *TINY, "--freeze", "layer1"], "classifier.1, body (all but the classifier)\n"),
    (
        [*TINY, "--freeze", "body,classifier.1"],
        "--freeze body,classifier.1: nothing of squeezenet1_1 would be left to train\n",
    ),
    (["--lr-body-factor", "0"], "--lr-body-factor: '0' is not above 0 and up to 1"),
    (["--stochastic-depth", "1"], "--stochastic-depth: '1' is not a number of 0 or more and bel"),
    (
        [*TINY, "--drop-path", "0.1"],
        "--stochastic-depth 0.1: squeezenet1_1 has no blocks that can be left out (ResNets, ",
    ),
    (["--early-stopping", "3"], "--early-stopping 3 needs --epochs"),
    (["--target-top1", "90"], "--target-top1 90 needs --epochs"),
    (["--save-steps", "3"], "--save-steps 3 needs --output-dir"),
    (["--tensorboard"], "--tensorboard needs --output-dir"),
    (["compare", "--operators"], "--operators is for train, not for compare"),
    (["--mirror", "memory://x"], "--mirror memory://x needs --output-dir"),
    (["--resume", "auto"], "--resume auto needs --output-dir"),
    (["--resume", "a.pt", "--init-from", "b.pt"], "--resume a.pt and --init-from b.pt: give one"),
    (["--test-only"], "--test-only needs --resume"),
    (
        ["--recipe", "imagenet-full", *TINY, "--drop-path", "0", "--resume", "auto"],
        "starts from trained weights, and out/imagenet-full has none: give --init-from PATH",
    ),
    (["--weights", "V1", "--init-from", "b.pt"], "--init-from b.pt and --weights V1: give one"),
    (["--weights", "V9", *TINY], "--weights V9: squeezenet1_1 has IMAGENET1K_V1, DEFAULT"),
    (["--weights", "DEFAULT", *TINY], "squeezenet1_1-b8a52dc0.pth: <urlopen error no network>; if"),
    (["--weights", "DEFAULT", "--model", "hybrid"], "--weights DEFAULT: hybrid has no weights by"),
    (["find-lr", "--weights", "V9", *TINY], "--weights V9: squeezenet1_1 has IMAGENET1K_V1"),
    (["compare", "--weights", "V9", *TINY], "--weights V9: squeezenet1_1 has IMAGENET1K_V1"),
    (["plan", "--weights", "V9", *TINY], "--weights V9: squeezenet1_1 has IMAGENET1K_V1"),
    (["find-lr", "--resume", "a.pt"], "--resume a.pt is for train and predict, not for find-lr"),
    (["plan", "--resume", "a.pt"], "--resume a.pt is for train and predict, not for plan"),
    (["find-lr", "--model", "resnet5"], "--model resnet5: unknown"),
    (["plan", "--model", "resnet5"], "--model resnet5: unknown"),
    ([*TINY, "--resume", "nowhere.pt"], "error: nowhere.pt: no such checkpoint"),
    ([*TINY, "--resume", str(SCRIPT)], f"error: {SCRIPT}: damaged, or no checkpoint"),
    ([*TINY, "--init-from", "nowhere.pt"], "--init-from nowhere.pt: cannot be read: No such file"),
    ([*TINY, "--init-from", str(SCRIPT)], f"--init-from {SCRIPT}: cannot be read: not a file of "),
    (["--teacher", "resnet50"], "--teacher resnet50 needs --teacher-weights"),
    (["--teacher-weights", "DEFAULT"], "--teacher-weights DEFAULT needs --teacher"),
    (["--teacher-share", "0.3"], "--teacher-share 0.3 needs --teacher and --teacher-weights"),
    (["--teacher-share", "1.5"], "--teacher-share: '1.5' is not a number from 0 to 1"),
    (
        [*TINY, "--teacher", "resnet5", "--teacher-weights", "DEFAULT"],
        "--teacher resnet5: unknown; did you mean ",
    ),
    (
        [*TINY, "--teacher-weights", "nowhere.pt"],
        "error: --teacher-weights nowhere.pt: cannot be read: No such file or directory",
    ),
    (
        ["compare", *TINY, "--teacher", "resnet5", "--teacher-weights", "t.pt"],
        "--teacher resnet5: unknown; did you mean ",
    ),
    (
        ["plan", *TINY, "--teacher", "resnet5", "--teacher-weights", "t.pt"],
        "--teacher resnet5: unknown; did you mean ",
    ),
    ([*TINY, "--test-only", "--resume", "nowhere.pt"], "error: nowhere.pt: no such checkpoint"),
    ([*TINY, "--mirror", "odd://x", "--output-dir", "out"], "--mirror odd://x: "),
    (["--data-path", "nowhere"], "--data-path nowhere does not exist"),
    (["--augment-confused", "c.json"], "--augment-confused c.json needs --data-path"),
    (["--data-path", str(SCRIPT)], "is a file, not a folder"),
    (["--data-path", "."], "--data-path .: no images"),
    (["--log-file", "nowhere/logs.md"], "--log-file nowhere/logs.md: cannot be written"),
    (["--output-dir", f"{SCRIPT}/out"], "cannot be written"),
    (["--schedule", "magic"], "invalid choice: 'magic'"),
    (["--schedule", "overlap"], "nothing to overlap with --accumulate 1: raise --accumulate to 2"),
    (["--schedule", "delayed", "--split", "none"], "has nothing to overlap with --split none"),
    (["--split", "auto", "--forward-threads", "2"], "--split auto chooses the thread counts"),
    (["--json", "c.json"], "--json c.json is for plan, compare and predict, not for train"),
    (["compare", "--csv", "c.csv"], "--csv c.csv: of compare only --split sweep makes such a t"),
    (["--machine", "m.json"], "--machine m.json is for plan, not for train"),
    (["compare", "--record", "m.json"], "--record m.json is for plan, not for compare"),
    (["plan", "--machine", "m.json"], "--machine m.json: cannot be read: No such file or direct"),
    (["plan", "--machine", str(SCRIPT)], f"--machine {SCRIPT}: not a machine's description"),
    (["plan", "--machine", "/", "--split", "auto"], "--split auto measures the machine that it "),
    (["plan", *TINY, "--record", "no/m.json"], "--record no/m.json: cannot be written: No such"),
    (["--precision", "fp16"], "invalid choice: 'fp16'"),
    (["compare", "--json", "nowhere/c.json"], "--json nowhere/c.json: cannot be written"),
    (["compare", "--schedule", "delayed"], "--schedule delayed: compare runs every schedule"),
    (["compare", "--epochs", "2"], "--epochs 2: compare takes --steps"),
    (
        ["compare", "--quick", "-b", "1"],
        "--batch-size 1: overlap needs a batch that can be divided",
    ),
    (
        ["compare", "--quick", "--model", "resnet18", "--image-size", "32", "-b", "3"],
        "--batch-size 1 ",
    ),
    (
        ["trian"],
        "unknown command 'trian' (choose from train, data, plan, find-lr, compare, predict)",
    ),
    (["trian"], "find-lr, compare, predict); did you mean train?\n"),
    (["find_lr"], "find-lr, compare, predict); did you mean find-lr?\n"),
    (["xyz"], "unknown command 'xyz' (choose from train, data, plan, find-lr, compare, predict)\n"),
    (["--unknown"], "unrecognized arguments: --unknown"),
    (["--xyz"], "unrecognized arguments: --xyz\n"),
    (["--batch", "4"], "unrecognized arguments: --batch 4"),
    (["--batch", "4"], "--batch 4; did you mean --batch-size"),
    (["--batchsize", "4"], "arguments: --batchsize 4; did you mean --batch-size?\n"),
    (["plan", "--batchsize=4"], "arguments: --batchsize=4; did you mean --batch-size?\n"),
    (["train", "x", "--batchsize", "4"], "x --batchsize 4; did you mean --batch-size?\n"),
    (["--recipe", "cifar10", "--epoch", "4"], "--epoch 4; did you mean --epochs"),
    (["--no-channel-last"], "--no-channel-last; did you mean --no-channels-last"),
    (
        ["--batchsize", "4", "--xyz", "--epoch=3"],
        "arguments: --batchsize 4 --xyz --epoch=3; did you mean --batch-size for --batchsize, "
        "--epochs for --epoch?\n",
    ),
    (["--xyz", "--uvw"], "unrecognized arguments: --xyz --uvw\n"),
    (["--mix-up", "1"], "--mix-up 1; did you mean --mixup?\n"),
    (["--wd", "x"], "argument --wd: 'x' is not a number of 0 or more\n"),
    (["--aa", "rand-m9-mstd0.5"], "argument --aa: invalid choice: 'rand-m9-mstd0.5' (choose from"),
    (["--sched", "plateau"], "argument --sched: invalid choice: 'plateau' (choose from"),
    (["plan", *TINY, "--json", "no/p.json"], "--json no/p.json: cannot be written: No such"),
    (["find-lr", "--json", "c.json"], "--json c.json is for plan, compare and predict, not for"),
    (["photos"], "unknown command 'photos'"),
    (["train", "photos"], "unrecognized arguments: photos\n"),
    (
        ["--model", "alexnet", "--image-size", "8", "-j", "0"],
        "alexnet cannot train on such batches",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_is_one_line(in_tmp, capsys, torch_cache, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("train_split_affinity.py: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(in_tmp.iterdir()), "nothing written"


def test_bad_input_as_a_process(in_tmp):
    done = run_script("--split", "0:1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert not list(in_tmp.iterdir())


def test_without_thread_affinity_only_split_none_works(in_tmp, capsys, monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert main([*TINY, "--steps", "1"]) == 2
    assert "--split even: Linux cannot keep threads on cores" in capsys.readouterr().err
    assert main([*TINY, "--steps", "1", "--split", "none"]) == 0
    assert "finished after 1 of 1 step" in capsys.readouterr().out


def test_a_non_finite_loss_is_exit_code_1(in_tmp, capsys):
    arguments = [*TINY, "--steps", "9", "--lr", "1e30", "--split", "none", "--momentum", "0"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("train_split_affinity.py: error: step ")
    assert "the loss is" in captured.err
