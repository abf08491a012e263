"""Evaluate a trained model on the test images of a class: the table, metrics, figures and report of train.py.

    python evaluate.py saveDir/tile-.../last.pt --datapath ../mvtec_anomaly_detection
    python evaluate.py saveDir/screw-.../last.pt --score bank --numTemplate 64   # no training
    python evaluate.py saveDir/tile-.../last.pt --datapath my_parts --cls line2 --anyClass

Results go to a new folder --out/<cls>-<date-time>/.  With --score, --imageScore, --mapSize or --roi, templates and
thresholds are made anew from the class's good training images, and scorer.pt there holds them for predict.py and
export.py.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

import report
from dataset import CACHES, DATASETS, AnomalyClass, Images, hold_out, open_class, open_folders
from fit import (
    UNCHANGED,
    add_checkpoint,
    add_score_flags,
    check_score_flags,
    finite_scores,
    options_of_flags,
    refit,
)
from metrics import PRO_LIMIT, evaluate_maps, result_table
from scorer import Scorer, TestSet, find_checkpoint, score_all
from util import (
    InputError,
    Parser,
    add_running_flags,
    check_writable,
    create_run_folder,
    describe_environment,
    number,
    run_script,
    start_log,
    start_on,
    write_csv,
    write_json,
)
from verdict import roi_remarks


def main() -> None:
    args = parse_arguments()
    device = start_on(args.gpu)
    check_writable(args.out, "--out")
    args.checkpoint = find_checkpoint(args.checkpoint)
    stored = Scorer.load(args.checkpoint, device, args.precision)
    anew = any((args.score, args.imageScore, args.mapSize, args.roi))
    data = find_data(args, stored, need_train=anew)
    name = data.name
    with finite_scores(args.checkpoint):
        scorers = refitted(stored, data, args, device) if anew else [stored]
        last = scorers[-1]
        test_set = TestSet.load(data, last.config, args.cache, args.numWorkers, device, last.roi)
        scored = score_all(scorers, test_set.images)
    for scorer, (maps, scores) in zip(scorers, scored, strict=True):
        metrics = asdict(evaluate_maps(maps, test_set.truth, args.proLimit, scores))
        epoch = stored.metrics.get("epoch")
        scorer.metrics = {"epoch": epoch, "score": scorer.options.score, **metrics}

    folder = create_run_folder(args.out, name, "--out")
    log = start_log(folder / "log.txt", describe_environment(device))
    for line in [*data.warnings, *roi_remarks(args.roi, test_set.images.paths)]:
        log.info(f"class {name}: {line}")
    rows = [{"class": name, "checkpoint": str(args.checkpoint), **s.metrics} for s in scorers]
    write_csv(folder / "metrics.csv", rows)
    settings = {flag: str(value) if isinstance(value, Path) else value for flag, value in vars(args).items()}
    write_json(folder / "result.json", {**rows[-1], "settings": settings})
    if anew:
        last.save(folder / "scorer.pt")
    report.save_evaluation(folder, test_set, scored[-1], last, rows, vars(args), args.proLimit)
    log.info(result_table([(name, label(row), row) for row in rows], args.proLimit))
    log.info(f"\nPercent. Written to {folder}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_checkpoint(parser)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--datapath", type=Path,
        help="folder of the class's folder, if it is not the one of the training",
    )  # fmt: skip
    group.add_argument("--dataset", choices=DATASETS, default="auto", help="layout of the data")
    group.add_argument("--cls", help="class in --datapath, if it is not the checkpoint's")
    group.add_argument("--anyClass", action="store_true", help="allow another class than the checkpoint's")
    group.add_argument("--cache", choices=CACHES, default="auto", help="decoded images")
    group = parser.add_argument_group("score", "the checkpoint's own, or with --score a new one")
    add_score_flags(group)
    group.add_argument(
        "--proLimit", type=number(0, 1, above=True), default=PRO_LIMIT,
        help="false-positive rate up to which the second PRO integrates",
    )  # fmt: skip
    group = parser.add_argument_group("running")
    add_running_flags(group)
    group.add_argument("--out", type=Path, default=Path("evaluations"), help="folder of the results")
    parser.set_defaults(**UNCHANGED)
    args = parser.parse_args()
    check_score_flags(args)
    return args


def find_data(args: argparse.Namespace, stored: Scorer, need_train: bool) -> AnomalyClass:
    """The class that the flags name, else the one of the training, with the same good images held out."""
    settings = stored.settings
    if settings.get("bad") is not None and args.datapath is None and args.cls is None:
        given = settings.get("good") or settings.get("datapath"), settings["bad"], settings.get("masks")
        try:
            data = open_folders(stored.class_name, *(None if path is None else Path(str(path)) for path in given))
        except InputError as error:
            where = f"the folders {args.checkpoint} was trained on cannot be used ({str(error).split(';')[0]})"
            raise InputError(f"{where}; give other data by --datapath and --cls") from None
    else:
        name = choose_class(args, stored)
        args.datapath = args.datapath or Path(str(settings.get("datapath", "../mvtec_anomaly_detection")))
        data = open_class(args.datapath, name, args.dataset, need_train)
    return hold_out(data, settings.get("holdout", 0), settings.get("seed", 0))


def choose_class(args: argparse.Namespace, stored: Scorer) -> str:
    """The class to evaluate on; raises InputError if the flags do not say which."""
    good = stored.settings.get("good")
    if good is not None and args.cls is None:
        raise InputError(
            f"{args.checkpoint} was trained by --good {good}, which is no class of a data set; give the data "
            "set by --datapath and the class by --cls"
        )
    name = args.cls or stored.class_name
    if name != stored.class_name and not args.anyClass and good is None:
        raise InputError(
            f"{args.checkpoint} is of class {stored.class_name}, not {name}; leave --cls out, or add "
            "--anyClass if both are the same kind of thing"
        )
    return name


def refitted(stored: Scorer, data: AnomalyClass, args: argparse.Namespace, device: torch.device) -> list[Scorer]:
    """Scorers of the stored weights and the class's good images: the paper's, and the asked one as the last."""
    images, held_out = (
        Images(paths, stored.image_size, args.cache, device, args.numWorkers, f"{name} images")
        for paths, name in ((data.train, "training"), (data.held_out, "held-out"))
    )
    options = options_of_flags(args, stored.options).with_papers
    return refit(stored, args, images, options, data.name, held_out)


def label(row: dict) -> str:
    """The epoch and the score."""
    return f"{'n/a' if row['epoch'] is None else row['epoch']} ({row['score']})"


if __name__ == "__main__":
    run_script(main)
