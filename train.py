"""Train PyramidFlow on good images of one class and evaluate it on the class's test images.

    python train.py --cls tile --datapath ../mvtec_anomaly_detection   # Res18, 1024x1024
    python train.py --cls tile --encoder none                          # FNF, 256x256, no download
    python train.py --cls screw --encoder none --numLayer 4 --augment none --gpu cpu
    python train.py --cls screw --encoder none --score bank            # parts at any angle
    python train.py --cls tile --encoderWeights resnet18-f37072fd.pth  # without network
    python train.py --good my_parts/good --encoder none --holdout 0.2  # a folder of good images is enough
    python train.py --cls tile wood carpet                             # one after the other; also: all
    python train.py --config saveDir/tile-.../config.json --seed 1     # the flags of another run
    python train.py --resume saveDir/tile-20260101-120000              # what a stopped run still lacks
    torchrun --nproc_per_node=4 train.py --cls tile                    # one run on four GPUs

Results go to a new folder saveDir/<cls>-<date-time>/; see the README.
"""

from __future__ import annotations

import argparse
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

import dataset
import util
from dataset import AnomalyClass, Augmentation, Images, normalize, training_order
from fit import add_score_flags, check_score_flags, options_of_flags, region_of_flags, with_map_size
from metrics import evaluate_maps, mean_row, result_table
from model import (
    CONTRASTS,
    ENCODER_BNS,
    ENCODERS,
    LOSSES,
    TEMPLATES,
    VOLUME_NORMS,
    PyramidFlow,
    PyramidFlowConfig,
    training_loss,
)
from runs import (
    RESULT_FILE,
    STATE_FILE,
    LossMeter,
    Pace,
    Run,
    State,
    activation_bytes,
    check_memory,
    evaluations_left,
    fill_encoder,
    initialize,
    load_state,
    remarks,
    what_to_show,
)
from scorer import Scorer, TestSet, fit_all, score_all
from util import Clock, DivergedError, InputError, Interrupted, Parser, StopSignals, number, whole_number
from verdict import FALSE_ALARM, LOWEST_RATE, Scored

# Flags that came after the first trainings: what these wrote lacks them, and has their defaults.
ADDED_FLAGS = ("good", "bad", "masks", "holdout", "falseAlarm", "imageScore", "mapSize", "roi")

# The official program's choices by class, where a flag says auto.
AUTO_NUM_LAYER = {"metal_nut": 8, "carpet": 8, "transistor": 8, "screw": 2}
AUTO_SVN = ("carpet", "grid", "bottle", "transistor")
AUTO_IMAGE_SIZE = {"none": 256, "resnet18": 1024, "resnet34": 1024}

# What may change when a run is resumed: where it computes, where its data are, and how long it goes on.
FREE_ON_RESUME = (
    "resume", "datapath", "good", "bad", "masks", "gpu", "numWorkers", "cache", "tensorboard", "epochs",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args, stored = parse_arguments(argv), None
    if args.resume is not None:
        stored = stopped_run(Path(args.resume))
        args = resumed_arguments(stored["settings"], argv)
    device = util.choose_device(args.gpu)
    util.join_processes(device)
    util.keep_freed_memory()
    if len(args.cls) > 1 or args.cls == ["all"]:
        train_classes(args, device)
    else:
        train_class(args, device, stored)
    util.leave_processes()


def train_class(args: Namespace, device: torch.device, stored: dict | None = None) -> dict:
    """A whole run, or what is left of it; the metrics of the last epoch.

    Args:
        stored: what a stopped run had saved.
    """
    data, asked, args = check_class(args), args, settle(args, device)
    config, reading = model_config(args), (args.cache, device, args.numWorkers)
    model = make_model(config, args, device, is_new=stored is None)
    augment = Augmentation.create(args.augment, args.cls[0], config.image_size, args.seed)
    train_set = Images(data.train, config.image_size, *reading, "training images")
    test_set = TestSet.load(data, config, args.cache, args.numWorkers, device, region_of_flags(args, config))
    held_out = Images(data.held_out, config.image_size, *reading, "held-out images")
    steps = len(util.share(range(len(data.train) // args.batchSize), equal=True))  # of an epoch
    optimizer = make_optimizer(model, args)
    scheduler = make_scheduler(optimizer, args, steps)
    state = State(args, model, optimizer, scheduler, data)
    state.restore(stored)

    network, evaluated = util.data_parallel(model), ()
    with Run(args, config, data, state, device) as run, StopSignals() as stop:
        run.say([*remarks(asked, args, config, data, device, augment), *without_effect(args)])
        pace = Pace(steps * (args.epochs + 1 - state.epoch), args.batchSize * util.world_size(), run.say)
        for epoch in range(state.epoch, args.epochs + 1):
            clock = Clock(device)
            with clock.part("training"):
                order = util.share(training_order(len(train_set), args.batchSize), equal=True)
                batches = train_set.batches(order, augment, epoch)
                bar = util.progress(batches, f"epoch {epoch}/{args.epochs}", len(order))
                loss = train_one_epoch(network, model, optimizer, scheduler, bar, args, stop, pace)
            util.average(model.buffers())  # in training nothing reads the running statistics
            check_finite(model)
            evaluated = ()
            if epoch % args.evalEvery == 0 or epoch == args.epochs:
                evaluated = evaluate(model, train_set, test_set, args, clock, held_out)
                pace.evaluated(clock, evaluations_left(args, epoch))
            run.end_epoch([scorer for scorer, _ in evaluated], loss, clock)
            stop.check()
        evaluated = evaluated or evaluate(model, train_set, test_set, args, Clock(device), held_out)
        run.finish(evaluated[-1][0], *what_to_show(test_set, train_set, held_out, evaluated))
    return state.rows[-1]


def train_one_epoch(
    network: nn.Module,
    model: PyramidFlow,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batches: Iterable[Tensor],
    args: Namespace,
    stop: StopSignals,
    pace: Pace | None = None,
) -> float:
    """One pass over the training images; the mean loss.

    Args:
        network: the model, or its DistributedDataParallel.
        batches: uint8 (B,h,w,3) on the device.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    # Every batch has the same shape, so cuDNN may try out what is fastest; but it would choose anew in the
    # thread that computes blocks again, and these are to be undone by the very numbers that made them.
    torch.backends.cudnn.benchmark = not args.saveMemory
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = LossMeter(batches, pace)
    model.train()
    for images in batches:
        latents, logdets = network(normalize(images), args.loss == "likelihood")
        loss = training_loss(model, latents, logdets, args.loss, args.template)  # Sec. 3.4
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.clipNorm)
        optimizer.step()
        scheduler.step()
        losses.add(loss)
        stop.check()
    return losses.mean()


def evaluate(
    model: PyramidFlow, train_set: Images, test_set: TestSet, args: Namespace, clock: Clock,
    held_out: Images | None = None,
) -> list[tuple[Scorer, Scored]]:  # fmt: skip
    """Scorers of the weights as they are, with the maps of the test images; --score's comes last.

    Without test images all metrics are None.

    Raises:
        DivergedError: a score is not finite.
    """
    torch.backends.cudnn.benchmark = False  # batches have many sizes here
    options, roi = options_of_flags(args).with_papers, test_set.truth.roi
    with clock.part("template"):
        scorers = fit_all(model, train_set, options, args.template, args.cls[0], vars(args), held_out, roi)
    with clock.part("test"):
        scored = score_all(scorers, test_set.images)
    with clock.part("metrics"):
        for option, scorer, (maps, scores) in zip(options, scorers, scored, strict=True):
            metrics = evaluate_maps(maps, test_set.truth, args.proLimit, scores)
            scorer.metrics = {"score": option.score, **asdict(metrics)}
    return list(zip(scorers, scored, strict=True))


def check_finite(model: PyramidFlow) -> None:
    """Raises DivergedError if the last step of an epoch, whose loss nobody sees, broke the weights."""
    if not all(x.isfinite().all() for x in model.state_dict().values()):
        raise DivergedError("the weights are no longer finite")


def make_model(config: PyramidFlowConfig, args: Namespace, device: torch.device, is_new: bool) -> PyramidFlow:
    """The seeded model on its device; of a new run with the weights that it starts from.

    Raises:
        InputError: the weights cannot be had, or do not fit; or the memory is too small for the model.
    """
    if is_new:
        check_memory(config, args.batchSize, device)
    torch.manual_seed(args.seed)
    model = PyramidFlow(config)
    if is_new:
        fill_encoder(model, args.encoderWeights)
        initialize(model, args.init)
    return model.to(device).compute_networks_in(util.apply_precision(args.precision))


def make_optimizer(model: PyramidFlow, args: Namespace) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = (args.beta1, args.beta2)
    return torch.optim.Adam(parameters, args.lr, betas, args.eps, weight_decay=args.weightDecay, fused=True)


def make_scheduler(
    optimizer: torch.optim.Optimizer, args: Namespace, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate of each step, as a share of --lr.

    Args:
        steps: of an epoch.
    """
    last, warmup = max(1, steps * args.epochs), steps * args.warmup

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if args.scheduler == "cosine":
            return rising * (1 + math.cos(math.pi * min(step, last) / last)) / 2
        return rising * (0.1 if args.scheduler == "step" and step >= 2 / 3 * last else 1.0)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_classes(args: Namespace, device: torch.device) -> None:
    """One run for each class, then a table of all; a class that fails does not stop the others."""
    if folder := folder_of_good(args):
        raise InputError(f"{folder} holds good images of one class; give --cls one name, or leave it out")
    datapath, classes = Path(args.datapath), args.cls
    if "all" in classes:
        classes = dataset.list_classes(datapath, dataset.recognize(datapath, args.dataset))
    if not classes:
        raise InputError(f"no classes in --datapath {datapath}; choose a data set's folder")
    runs, rows, failed = [], [], []
    for name in classes:  # before the first one is trained
        one = Namespace(**{**vars(args), "cls": [name]})
        try:
            check_class(one)
            runs.append(one)
        except InputError as error:
            if "all" not in args.cls:
                raise
            failed.append(f"{name}: {error}")
            if util.is_main():
                print(f"left out: {failed[-1]}", file=sys.stderr)
    try:
        for one in runs:
            try:
                row = train_class(one, device)
                rows.append((one.cls[0], f"{row['epoch']} (last)", row))
            except InputError as error:
                if isinstance(error, Interrupted) or util.world_size() > 1:  # the others wait for this process
                    raise
                failed.append(f"{one.cls[0]}: {error}")
    finally:
        if util.is_main() and rows:
            print("\n" + result_table([*rows, *mean_row(rows)], args.proLimit))
    if failed:
        raise InputError("; ".join(failed))


# -------------------------------------------------------------------------------------- flags


def make_parser() -> Parser:
    """All flags, with the official names and defaults where the official program has them."""
    parser = Parser(description=__doc__)
    for add_flags in (add_data_flags, add_model_flags, add_training_flags, add_other_flags):
        add_flags(parser)
    return parser


def auto_or(convert: Callable[[str], object]) -> Callable[[str], object]:
    """An argparse type: auto, or what `convert` takes."""
    return lambda text: "auto" if text == "auto" else convert(text)


# fmt: off
def add_data_flags(parser: Parser) -> None:
    """Which images there are, and how they are read."""
    add = parser.add_argument_group("data").add_argument
    add("--cls", nargs="+", default=["tile"], metavar="CLASS", help="folders of --datapath, one run each; or all")
    add("--datapath", default="../mvtec_anomaly_detection",
        help="folder of MVTec AD, AD 2 or LOCO, BTAD, VisA, Real-IAD, or data in MVTec's layout")
    add("--good", metavar="DIR",
        help="folder of good images, instead of --datapath, which may also be one; its name is the class's")
    add("--bad", metavar="DIR", help="with --good: folder of defective test images")
    add("--masks", metavar="DIR", help="with --bad: folder of their masks, NAME_mask.png or NAME.png")
    add("--holdout", type=auto_or(number(0, dataset.MOST_HOLDOUT)), default="auto", metavar="SHARE",
        help="of the good images that thresholds come from, and nothing else; auto: 0.1 of 50 or more if there "
        "are no good test images, else 0")
    add("--dataset", choices=dataset.DATASETS, default="auto", help="layout; auto recognizes it")
    add("--imageSize", type=auto_or(whole_number(1, 2**14)), nargs="+", default=["auto"], metavar="N",
        help="input size, one number or H W; auto: 256 with --encoder none, else 1024")
    add("--augment", default="auto", metavar="{auto,none,flips,turns,FILE}",
        help="auto: flips and turns for MVTec's five textures; flips, turns: for any class; or a pipeline "
        "serialized by albumentations")
    add("--cache", choices=dataset.CACHES, default="auto",
        help="decoded images: ram, kept; none, read each time; auto: by free memory")


def add_model_flags(parser: Parser) -> None:
    """The architecture, and the weights it starts from."""
    add = parser.add_argument_group("model").add_argument
    add("--encoder", choices=ENCODERS, default="resnet18", help="none: fixed 1x1 convolution (FNF)")
    add("--encoderBN", choices=ENCODER_BNS, default="batch",
        help="the encoder's BatchNorm while training: the batch's statistics, or frozen")
    add("--encoderWeights", metavar="PATH", help="file with torchvision's names, instead of a download")
    add("--numLayer", choices=("auto", *"2345678"), default="auto", metavar="{auto,2..8}",
        help="levels of the pyramid; auto: by class")
    add("--volumeNorm", choices=("auto", *VOLUME_NORMS), default="auto", help="normalization; auto: by class")
    add("--kernelSize", type=whole_number(1, 99), default=7, help="of the coupling blocks' convolutions, odd")
    add("--numChannel", type=whole_number(1, 1024), default=16, help="channels with --encoder none")
    add("--numStack", type=whole_number(1, 256), default=4, help="repetitions of the coupling blocks' schedule")
    add("--init", metavar="LAST.pt", help="start from the weights of a checkpoint")


def add_training_flags(parser: Parser) -> None:
    """The optimizer, and the paper's ablations."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=whole_number(1), default=15, help="passes over the training images")
    add("--batchSize", type=whole_number(1), default=2, help="images per step")
    add("--seed", type=whole_number(0), default=0, help="of weights, order and augmentation")
    add("--lr", type=number(0, above=True), default=2e-4, help="Adam's learning rate")
    add("--beta1", type=number(0, 0.9999), default=0.5, help="Adam's first beta")
    add("--beta2", type=number(0, 0.99999), default=0.9, help="Adam's second beta")
    add("--eps", type=number(0, above=True), default=1e-4, help="Adam's epsilon")
    add("--weightDecay", type=number(0), default=1e-5, help="Adam's weight decay")
    add("--clipNorm", type=number(0, above=True), default=1.0, help="largest norm of the gradient")
    add("--scheduler", choices=("constant", "cosine", "step"), default="constant",
        help="of the learning rate; cosine: to zero; step: a tenth for the last third")
    add("--warmup", type=number(0), default=0.0, metavar="EPOCHS", help="in which the learning rate rises")
    add("--saveMemory", type=auto_or(util.boolean), default="auto", metavar="{auto,true,false}",
        help="backpropagate by inversion: memory does not grow with depth; auto: where the activations would "
        "take half of the free memory")

    add = parser.add_argument_group("ablations", "of the paper's Table 2").add_argument
    add("--loss", choices=LOSSES, default="fourier",
        help="spatial: without the Fourier transform; likelihood: of a Gaussian, for --volumeNorm none")
    add("--template", choices=TEMPLATES, default="mean",
        help="what latents are contrasted with: each other and their mean; or zero, in training and in the score")
    add("--contrast", choices=CONTRASTS, default="latent",
        help="latent: differences are composed; composed: compose, then difference")


def add_other_flags(parser: Parser) -> None:
    """The score, where it runs, and what it writes."""
    group = parser.add_argument_group("score")
    add_score_flags(group)
    group.add_argument("--falseAlarm", type=number(LOWEST_RATE, 1), default=FALSE_ALARM, metavar="RATE",
        help="share of good images that the default threshold may call defective")
    group.add_argument("--proLimit", type=number(0, 1, above=True), default=0.3,
        help="false-positive rate up to which the second PRO integrates")

    group = parser.add_argument_group("running")
    util.add_running_flags(group)
    add = group.add_argument
    add("--evalEvery", type=whole_number(1), default=1, help="epochs from evaluation to evaluation; also the last")
    add("--saveDir", default="saveDir", help="folder in which the run's folder is made")
    add("--resume", metavar="RUN",
        help="folder of a run to resume; its settings come with it; with more --epochs also a finished one")
    add("--config", metavar="FILE", help="yaml or json of flags, as a run's config.json; the command line wins")
    add("--tensorboard", action="store_true", help="also log for TensorBoard (pip install tensorboard)")
# fmt: on


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    """All flags: of the command line, of its --config, and defaults."""
    parser = make_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    first = parser.parse_args(argv)
    config = first.config if first.resume is None else None  # else refused by `resumed_arguments`
    words = [*(config_arguments(parser, Path(config)) if config else ()), *argv]
    args, given = parser.parse_args(words), given_flags(argv)
    if "datapath" in given and "good" in given:
        raise InputError("--good and --datapath both say where the images are; give one of them")
    named = "cls" in given_flags(words)
    if "datapath" in given and args.good is not None:  # of --config, which named the class by it
        vars(args).update({name: None for name in ("good", "bad", "masks") if name not in given})
        named = "cls" in given
        args.cls = args.cls if named else parser.get_default("cls")
    if (folder := folder_of_good(args)) and not named:
        name = folder.resolve().name
        args.cls = ["images" if name in ("", "all") else name]
    return args


def folder_of_good(args: Namespace) -> Path | None:
    """The folder that holds the good images itself: --good, or a --datapath that holds images and no classes."""
    if args.good is not None:
        return Path(args.good)
    return Path(args.datapath) if dataset.is_flat(Path(args.datapath), args.dataset) else None


def open_data(args: Namespace) -> AnomalyClass:
    """The files of the class, as the flags say.

    Raises:
        InputError: they do not fit together, or something is missing.
    """
    folder = folder_of_good(args)
    bad, masks = (None if path is None else Path(path) for path in (args.bad, args.masks))
    if masks and not bad:
        raise InputError("--masks belong to the images of --bad; give both")
    if folder is None:
        if bad:
            raise InputError("--bad needs the folder of the good images; give it by --good")
        data = dataset.open_class(Path(args.datapath), args.cls[0], args.dataset, need_test=False)
    else:
        data = dataset.open_folders(args.cls[0], folder, bad, masks)
    return dataset.hold_out(data, args.holdout, args.seed)


def config_arguments(parser: Parser, path: Path) -> list[str]:
    """The flags in a yaml or json file, as on the command line.

    Raises:
        InputError: it cannot be read, or names something that is no flag.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))  # json is yaml
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "not yaml or json"
        raise InputError(f"--config {path}: cannot be read ({reason}); choose another file") from None
    given = given.get("settings", given) if isinstance(given, dict) else given
    if not isinstance(given, dict):
        raise InputError(f"--config {path}: not a table of flags such as `epochs: 15`; choose another file")
    return flag_words(parser, given, f"--config {path}")


def flag_words(parser: Parser, given: dict, where: str) -> list[str]:
    """Flags and their values, as on the command line; None and false switches are left out.

    Raises:
        InputError: something is no flag; `where` it stands is named.
    """
    actions, words = {action.dest: action for action in parser._actions}, []
    for name, value in given.items():
        if name not in actions or name == "help":
            raise InputError(f"{where}: {name!r} is no flag of train.py; see --help")
        is_switch = actions[name].nargs == 0
        if value is None or (value is False and is_switch):
            continue
        values = value if isinstance(value, list) else [value]
        if not all(map(util.is_plain, values)):
            raise InputError(f"{where}: {name} has a value that is no word or number; see --help")
        words += [f"--{name}", *(() if is_switch else map(str, values))]
    return words


def given_flags(argv: list[str] | None) -> dict[str, object]:
    """The flags that stand on the command line."""
    parser = make_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def model_config(args: Namespace) -> PyramidFlowConfig:
    """The architecture that the flags ask for, `auto` settled by class; --saveMemory auto counts as true.

    Raises:
        InputError: the flags do not fit together.
    """
    size, name = args.imageSize, args.cls[0]
    if size == ["auto"]:
        size = [AUTO_IMAGE_SIZE[args.encoder]]
    if len(size) > 2 or "auto" in size:
        raise InputError("--imageSize takes auto, one number, or two (height width)")
    num_level, volume_norm = args.numLayer, args.volumeNorm
    if num_level == "auto":
        num_level = AUTO_NUM_LAYER.get(name, 4)
    if volume_norm == "auto":
        volume_norm = "SVN" if name in AUTO_SVN else "CVN"
    try:
        config = PyramidFlowConfig(
            args.encoder, args.encoderBN, int(num_level), args.numStack, args.numChannel, args.kernelSize,
            volume_norm, image_size=(size[0], size[-1]), contrast=args.contrast,
            save_memory=args.saveMemory is not False,
        )  # fmt: skip
        return with_map_size(config, args.mapSize)
    except ValueError as error:
        raise InputError(str(error)) from None


def settle(args: Namespace, device: torch.device) -> Namespace:
    """The flags, with the precision and the way of backpropagation chosen where they are auto.

    Raises:
        InputError: the device does not have the precision.
    """
    precision, save_memory = util.choose_precision(args.precision, device), args.saveMemory
    if save_memory == "auto":
        need = activation_bytes(model_config(args), args.batchSize, precision, device)
        sharing = util.world_size() if device.type == "cpu" else 1
        save_memory = 2 * need * sharing > util.free_memory(device)
    return Namespace(**{**vars(args), "precision": precision, "saveMemory": save_memory})


def without_effect(args: Namespace) -> list[str]:
    """A line about each flag that was set and that the encoder makes no use of."""
    unread = ("encoderBN", "encoderWeights") if args.encoder == "none" else ("numChannel",)
    set_ = [flag for flag in unread if getattr(args, flag) != make_parser().get_default(flag)]
    return [f"--{flag} has no effect with --encoder {args.encoder}" for flag in set_]


def check_class(args: Namespace) -> AnomalyClass:
    """The class, if its files and the flags fit together.

    Raises:
        InputError: they do not.
    """
    model_config(args)
    check_score_flags(args)
    if args.resume is None:
        util.check_writable(Path(args.saveDir))
    data = open_data(args)
    count, batch, processes = len(data.train), args.batchSize, util.world_size()
    of_pairs = args.loss != "likelihood" and args.template == "mean"
    for wrong, message in (
        (count < 2, f"class {data.name} has {count} training images; add some, at least 2"),
        (batch < 2 and of_pairs, "--batchSize 1: the loss compares pairs of images; use at least 2"),
        (batch > count, f"--batchSize {batch} is more than the {count} training images; use 2 to {count}"),
        (batch * processes > count,
         f"{processes} processes with --batchSize {batch} need at least as many images, there are {count}; "
         "start fewer"),
    ):  # fmt: skip
        if wrong:
            raise InputError(message)
    return data


# ------------------------------------------------------------------------------------- resume


def stopped_run(folder: Path) -> dict:
    """`runs.load_state`, with the flags that are newer than the run at their defaults.

    Raises:
        InputError: the folder holds no run that can be resumed.
    """
    stored, defaults = load_state(folder), vars(make_parser().parse_args([]))
    later = {**{name: defaults[name] for name in ADDED_FLAGS}, "imageScore": "max"}  # before there was auto
    stored["settings"] = {**later, **stored["settings"]}
    if stored["settings"].keys() != defaults.keys():
        raise InputError(f"{folder / STATE_FILE} is not the state of a run of this version; start again")
    return stored


def resumed_arguments(stored: dict, argv: list[str] | None) -> Namespace:
    """The settings of a stopped run, with the flags that may change.

    Raises:
        InputError: a given flag contradicts the run's, or nothing is left to do.
    """
    given, parser = given_flags(argv), make_parser()
    where = f"--resume {given['resume']}"
    if "config" in given:
        raise InputError(f"{where}: a run keeps its own settings; leave --config out")
    for name, value in given.items():
        if name not in FREE_ON_RESUME and not agrees(name, value, stored[name]):
            raise InputError(
                f"--{name} {value} contradicts the run in {given['resume']}, which has {stored[name]}; leave "
                "the flag out, or start a new run"
            )
    words = flag_words(parser, {**stored, "config": None, "resume": None}, where)
    free = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    args, done = Namespace(**{**vars(parser.parse_args(words)), **free}), stored["epochs"]
    if (Path(args.resume) / RESULT_FILE).is_file() and args.epochs <= done:
        raise InputError(f"{where}: this run is finished after {done} epochs; give more --epochs")
    if args.epochs < done:
        raise InputError(f"--epochs {args.epochs}: the run has {done}; give as many, or more")
    return args


def agrees(name: str, given: object, stored: object) -> bool:
    """Whether a flag asks for what the run has: auto does, and one number for a square image."""
    if name in ("imageSize", "mapSize"):
        return (given[0], given[-1]) == (stored[0], stored[-1])
    return given == stored or (name in ("precision", "saveMemory") and given == "auto")


if __name__ == "__main__":
    util.run_script(main)
