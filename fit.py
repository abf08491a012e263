"""Fit a trained model to other good images of the same part: a new lamp or camera needs no training.

    python fit.py saveDir/screw-.../last.pt new_lamp/good --out screw-new_lamp.pt
    python fit.py saveDir/screw-.../last.pt new_lamp/good --out bank.pt --score bank --numTemplate 64
    python fit.py saveDir/screw-.../last.pt screws/good --out fine.pt --mapSize native --roi part.png

Weights stay as they are; templates, whitening and thresholds are made from the images.  The new file is what
predict.py, evaluate.py and export.py take.  Flags and steps that train.py and evaluate.py share are here, too.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dataset import IMAGE_SUFFIXES, AnomalyClass, Images, list_images, oddities
from model import PyramidFlowConfig
from scorer import IMAGE_SCORES, LARGEST, MOST_SMOOTH, MOST_TEMPLATES, SCORES, ScoreOptions, Scorer, fit_all
from util import (
    DivergedError,
    InputError,
    Parser,
    add_running_flags,
    boolean,
    check_writable,
    count_images,
    number,
    run_script,
    start_on,
    whole_number,
)
from verdict import read_roi, resize_roi, roi_remarks

UNCHANGED = {"score": None, "imageScore": None, "mapSize": None}  # where a checkpoint has its own


def main() -> None:
    args = parse_arguments()
    device = start_on(args.gpu)
    if args.out.exists():
        raise InputError(f"--out {args.out} exists; choose a new file")
    if args.out.suffix.lower() == ".onnx":
        raise InputError(f"--out {args.out}: an .onnx file is made by export.py; choose a name that ends in .pt")
    check_writable(args.out.parent, "--out")
    stored = Scorer.load(args.checkpoint, device, args.precision)
    paths = find_good_images(args.good)
    odd = oddities(AnomalyClass(stored.class_name, paths, []), [args.good])
    for line in [*odd, *roi_remarks(args.roi, paths)]:
        print(line)
    images = Images(paths, stored.image_size, "auto", device, args.numWorkers, "good images")
    options = options_of_flags(args, stored.options)
    with finite_scores(args.checkpoint):
        scorer = refit(stored, args, images, [options], stored.class_name)[0]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scorer.save(args.out)
    print(describe(scorer, len(images), options, args.out))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_checkpoint(parser)
    parser.add_argument("good", type=Path, help="folder of good images, itself and not its subfolders")
    parser.add_argument("--out", type=Path, required=True, metavar="NEW.pt", help="file to write, new")
    add_score_flags(parser.add_argument_group("score", "the checkpoint's own, or what is given"))
    add_running_flags(parser.add_argument_group("running"))
    parser.set_defaults(**UNCHANGED)
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
            f"{folder} holds {count_images(len(paths))}; thresholds need at least two good ones "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}), and a scorer gets better with more"
        )
    return paths


def describe(scorer: Scorer, count: int, asked: ScoreOptions, out: Path) -> str:
    """What was fitted, and the command that uses it, in one line."""
    thresholds, made, score = scorer.calibration.thresholds(), scorer.options, "paper"
    if made.score == "bank":
        score = f"bank of {made.num_template}"
        if made.num_template < asked.num_template:
            score += f" of {asked.num_template} templates: the mean and all {count} images"
    return (
        f"{count} good images, score {score}, image threshold {thresholds.image:.4g}, pixel threshold "
        f"{thresholds.pixel:.4g}; written to {out}; to use it: python predict.py {shlex.quote(str(out))} "
        "IMAGES --out predictions"
    )


# ------------------------------------------------------------------- what other commands share


@contextlib.contextmanager
def finite_scores(checkpoint: Path) -> Iterator[None]:
    """Says what is wrong where no training is to blame for scores that are not finite."""
    try:
        yield
    except DivergedError:
        raise InputError(f"{checkpoint} gives scores that are not finite; use another") from None


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    help_ = "a .pt file of train.py or fit.py, or a run's folder"
    parser.add_argument("checkpoint", type=Path, help=help_)


def add_score_flags(parser: argparse._ActionsContainer) -> None:
    """The flags of all scripts that fit a scorer."""
    add, default = parser.add_argument, ScoreOptions()
    # fmt: off
    add("--score", choices=SCORES, default=default.score,
        help="paper: difference to the mean latent; bank: to the best fitting of several good images, for parts "
        "at any angle and wandering textures")
    add("--numTemplate", type=whole_number(1, MOST_TEMPLATES), default=default.num_template, metavar="K",
        help="--score bank: templates, the mean among them")
    add("--whiten", type=boolean, default=default.whiten, metavar="{true,false}",
        help="--score bank: divide differences by their usual size, per level and channel")
    add("--smooth", type=number(0, MOST_SMOOTH), default=default.smooth, metavar="PIXELS",
        help="--score bank: deviation of a Gaussian over the anomaly map, in its pixels")
    add("--imageScore", choices=("auto", *IMAGE_SCORES), default="auto",
        help="of an image: max, its highest pixel; top, the mean of the highest in a thousand pixels; detail, the "
        "same of what a Gaussian of 1 pixel takes away from the map; auto: max, and with --score bank detail")
    add("--mapSize", type=_side, nargs="+", default=[256], metavar="N",
        help="of anomaly maps, and of masks for the metrics: one number, H W, or native, as fine as the finest "
        "level; 256 is the paper's")
    add("--roi", metavar="MASK.png",
        help="white where the part is, of any size; what lies outside counts neither for scores and thresholds "
        "nor for metrics")
    # fmt: on


def _side(text: str) -> int | str:
    return text if text == "native" else whole_number(1, LARGEST)(text)


def check_score_flags(args: argparse.Namespace) -> None:
    """Raises InputError if a flag of the bank was given without the bank, or no size by --mapSize."""
    default, given = ScoreOptions(), (args.numTemplate, args.whiten, args.smooth)
    if args.score != "bank" and given != (default.num_template, default.whiten, default.smooth):
        raise InputError("--numTemplate, --whiten and --smooth need --score bank; add it")
    if args.mapSize and (len(args.mapSize) > 2 or (len(args.mapSize) > 1 and "native" in args.mapSize)):
        raise InputError("--mapSize takes native, one number, or two (height width)")


def options_of_flags(args: argparse.Namespace, stored: ScoreOptions | None = None) -> ScoreOptions:
    """What the flags ask for, else what is stored."""
    if args.score is None:
        return replace(stored, image_score=args.imageScore or stored.image_score)
    return ScoreOptions(args.score, args.numTemplate, args.whiten, args.smooth, args.imageScore or "auto")


def with_map_size(config: PyramidFlowConfig, given: Sequence[int | str] | None) -> PyramidFlowConfig:
    """The configuration with the maps' size that --mapSize asks for; None: its own."""
    if given is None:
        return config
    size = config.level_size(0) if given[0] == "native" else (given[0], given[-1])
    return replace(config, map_size=size)


def region_of_flags(
    args: argparse.Namespace, config: PyramidFlowConfig, stored: Scorer | None = None
) -> Tensor | None:
    """--roi, else what is stored: bool (H,W) of the map size; raises InputError as `read_roi`."""
    roi = None if stored is None else stored.region(None)
    roi = roi if args.roi is None else read_roi(args.roi)
    return None if roi is None else torch.from_numpy(resize_roi(roi, config.map_size))


def refit(
    stored: Scorer, args: argparse.Namespace, images: Images, options: Sequence[ScoreOptions],
    class_name: str, held_out: Images | None = None,
) -> list[Scorer]:  # fmt: skip
    """Scorers of the stored weights and other good images; the stored one is no longer to be used."""
    config = with_map_size(stored.config, args.mapSize)
    roi, stored.model.config = region_of_flags(args, config, stored), config
    template = stored.settings.get("template", "mean")
    return fit_all(stored.model, images, options, template, class_name, stored.settings, held_out, roi)


if __name__ == "__main__":
    run_script(main)
