"""Fit a trained model to other good images of the same part: a new lamp or camera needs no training.

    python fit.py saveDir/screw-.../last.pt new_lamp/good --out screw-new_lamp.pt
    python fit.py saveDir/screw-.../last.pt new_lamp/good --out bank.pt --score bank --numTemplate 64

Weights stay as they are; templates, whitening and thresholds are made of the images.  The new file is what
predict.py, evaluate.py and export.py take.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from dataset import IMAGE_SUFFIXES, Images, list_images
from scorer import ScoreOptions, Scorer, add_score_flags, check_score_flags, start_on
from util import InputError, Parser, add_running_flags, check_writable, run_script


def main() -> None:
    args = parse_arguments()
    device = start_on(args.gpu)
    if args.out.exists():
        raise InputError(f"--out {args.out} exists; choose a new file")
    check_writable(args.out.parent, "--out")
    stored = Scorer.load(args.checkpoint, device, args.precision)
    options = stored.options if args.score is None else ScoreOptions.from_flags(args)
    paths = find_good_images(args.good)
    images = Images(paths, stored.image_size, "auto", device, args.numWorkers, "good images")
    template = stored.settings.get("template", "mean")
    scorer = Scorer.fit(stored.model, images, options, template, stored.class_name, stored.settings)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scorer.save(args.out)
    print(describe(scorer, len(images), args.out))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "checkpoint", type=Path, help="a .pt file of train.py or fit.py, or a run's folder"
    )
    parser.add_argument("good", type=Path, help="folder of good images, itself and not its subfolders")
    parser.add_argument("--out", type=Path, required=True, metavar="NEW.pt", help="file to write, new")
    add_score_flags(parser.add_argument_group("score", "the checkpoint's own, or with --score another"))
    add_running_flags(parser.add_argument_group("running"))
    parser.set_defaults(score=None)
    args = parser.parse_args()
    check_score_flags(args)
    return args


def find_good_images(folder: Path) -> list[Path]:
    """The images in a folder.

    Raises:
        InputError: there is no such folder, or fewer than two images are in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; choose one that holds good images")
    paths = list_images(folder)
    if len(paths) < 2:
        raise InputError(
            f"{folder} holds {len(paths) or 'no'} image{'s' * (len(paths) != 1)}; thresholds need at least "
            f"two good ones ({', '.join(sorted(IMAGE_SUFFIXES))}), and a scorer gets better with more"
        )
    return paths


def describe(scorer: Scorer, count: int, out: Path) -> str:
    """What was fitted, and the command that uses it, in one line."""
    thresholds, options = scorer.calibration.thresholds(), scorer.options
    score = f"bank of {options.num_template}" if options.score == "bank" else "paper"
    return (
        f"{count} good images, score {score}, image threshold {thresholds.image:.4g}, pixel threshold "
        f"{thresholds.pixel:.4g}; written to {out}; to use it: python predict.py {shlex.quote(str(out))} "
        "IMAGES --out predictions"
    )


if __name__ == "__main__":
    run_script(main)
