"""Evaluate a trained model on the test images of a class: the table, the metrics and the pictures of train.py.

    python evaluate.py saveDir/tile-.../last.pt --datapath ../mvtec_anomaly_detection
    python evaluate.py saveDir/tile-.../last.pt --datapath my_parts --cls line2 --anyClass
    python evaluate.py --official best.npz --cls tile --datapath ../mvtec_anomaly_detection

Results go to a new folder --out/<cls>-<date-time>/.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

import pictures
from calibration import calibrate
from checkpoint import Trained, save_checkpoint
from dataset import DATASETS, open_class
from evaluation import TestSet, features_in_order, result_table
from hardware import (
    apply_precision,
    choose_device,
    choose_precision,
    describe_environment,
    keep_freed_memory,
)
from loading import CACHES, FeatureSource, ImageStore
from metrics import evaluate_maps
from model import latent_template
from official import load_official
from run import image_template
from settings import add_running_flags
from util import (
    InputError,
    Parser,
    check_writable,
    create_run_folder,
    run_script,
    start_log,
    whole_number,
    write_csv,
    write_json,
)


def main() -> None:
    arguments = parse_arguments()
    device = choose_device(arguments.gpu)
    keep_freed_memory()
    check_writable(arguments.out, "--out")
    if arguments.official:
        trained = read_official_weights(arguments, device)
    else:
        trained = Trained.load(arguments.checkpoint, device, arguments.precision)
    name = arguments.cls or trained.class_name
    if name != trained.class_name and not arguments.anyClass:
        raise InputError(
            f"{trained.path} is of class {trained.class_name}, not {name}; leave --cls out, or add --anyClass "
            "if both are the same kind of thing"
        )
    data = open_class(arguments.datapath, name, arguments.dataset, need_train=False)
    test_set = TestSet.load(data, trained.model, arguments.cache, arguments.numWorkers, device)
    maps = test_set.anomaly_maps(trained.model, trained.template)
    metrics = evaluate_maps(maps, test_set.truth)

    folder = create_run_folder(arguments.out, name, "--out")
    log = start_log(folder / "log.txt", describe_environment(device))
    row = {"class": name, "checkpoint": str(trained.path), **asdict(metrics)}
    write_csv(folder / "metrics.csv", [row])
    write_json(folder / "result.json", row)
    template = image_template(trained.model, trained.template)
    pictures.save_evaluation(folder / "pictures", test_set, maps, trained.calibration, template)
    if arguments.official:
        save_checkpoint(folder / "converted.pt", trained.content(asdict(metrics)))
    log.info(result_table([(name, str(trained.metrics.get("epoch", "n/a")), asdict(metrics))]))
    log.info(f"\nPercent. Written to {folder}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a .pt file that train.py wrote")
    parser.add_argument(
        "--official", type=Path, metavar="FILE.npz", help="weights of the official program instead"
    )
    parser.add_argument(
        "--officialChoice", choices=("pixel", "pro"), default="pixel",
        help="--official: the weights chosen by pixel AUROC, or by PRO [pixel]",
    )  # fmt: skip
    parser.add_argument(
        "--imageSize", type=whole_number(1), nargs="+", metavar="N",
        help="--official: input size, one number or H W [what the weights show, else 256 or 1024]",
    )  # fmt: skip
    parser.add_argument(
        "--datapath", type=Path, default=Path("../mvtec_anomaly_detection"),
        help="folder of the class's folder [../mvtec_anomaly_detection]",
    )  # fmt: skip
    parser.add_argument("--dataset", choices=DATASETS, default="auto", help="layout of the data [auto]")
    parser.add_argument("--cls", help="class in --datapath [the checkpoint's]")
    parser.add_argument(
        "--anyClass", action="store_true", help="allow another class than the checkpoint's"
    )
    parser.add_argument("--out", type=Path, default=Path("evaluations"), help="folder [evaluations]")
    add_running_flags(parser)
    parser.add_argument("--cache", choices=CACHES, default="auto", help="decoded images [auto]")
    arguments = parser.parse_intermixed_args()
    if (arguments.checkpoint is None) == (arguments.official is None):
        parser.error("name a checkpoint, or --official FILE.npz")
    if arguments.official and not arguments.cls:
        parser.error("--official needs --cls, the class that the weights were trained on")
    if arguments.imageSize and len(arguments.imageSize) > 2:
        parser.error("--imageSize takes one number, or two (height width)")
    return arguments


def read_official_weights(arguments: argparse.Namespace, device: torch.device) -> Trained:
    """The official program's model, with a template made of the class's training images."""
    size = arguments.imageSize
    size = (size[0], size[-1]) if size else None
    model = load_official(arguments.official, arguments.officialChoice, size)
    precision = choose_precision(arguments.precision, device, trained_in="fp32")
    model.to(device).compute_networks_in(apply_precision(precision)).eval()
    config = model.config
    data = open_class(arguments.datapath, arguments.cls, arguments.dataset)
    store = ImageStore(
        data.train, config.image_size, arguments.cache, device, arguments.numWorkers, "training images"
    )
    source = FeatureSource(store, model.encode, constant=config.encoder != "none")
    template = latent_template(model, features_in_order(source, config, "template"))
    calibration = None
    if len(store) > 1:
        calibration = calibrate(model, template, features_in_order(source, config, "good scores"))
    return Trained(arguments.official, arguments.cls, model, template, {}, calibration)


if __name__ == "__main__":
    run_script(main)
