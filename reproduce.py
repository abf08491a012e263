"""Train what a table of the paper needs, and print our numbers beside the paper's.

    python reproduce.py table3 --datapath ../mvtec_anomaly_detection           # MVTec AD, FNF and Res18
    python reproduce.py table2 --classes screw --seeds 0 1 2 --encoder none    # the ablations on one class
    python reproduce.py table4 --datapath ../BTech_Dataset_transformed         # BTAD
    python reproduce.py table3 --jobs 8                                        # eight at once
    python reproduce.py table3 --slurm partition=gpu gres=gpu:1 time=240       # on a cluster
    python reproduce.py fig5; python reproduce.py fig7 --classes tile screw    # memory; the pictures
    python reproduce.py table2 --classes screw -- --numLayer 4                 # more flags for every train.py

Written to --out: <table>/results.csv (a row for each class, seed and choice of the epoch), <table>/table.md, and
jobs/, whose finished trainings all tables share.  The same command again completes what is missing.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import pictures
from dataset import MVTEC_TEXTURES, list_classes, recognise
from evaluation import percent
from jobs import Job, Machines, run_jobs, shown
from metrics import METRIC_NAMES
from settings import augmentation, model_config, parse_settings
from util import (
    InputError,
    Interrupted,
    Parser,
    StopRequest,
    atomic_path,
    check_writable,
    lock,
    run_script,
    whole_number,
    write_csv,
)

ROOT = Path(__file__).parent
PAPER_TABLES = ROOT / "paper_tables"
FNF = ("--encoder", "none", "--augment", "none")  # the paper's FNF rows are without augmentation
RES18 = ("--encoder", "resnet18")
TABLE3_CLASSES = (
    "carpet", "leather", "tile", "wood", "bottle", "cable", "capsule", "hazelnut", "pill", "toothbrush",
    "transistor", "zipper",
)  # fmt: skip
TABLE5_CLASSES = ("grid", "metal_nut", "screw")
MVTEC_CLASSES = (*TABLE3_CLASSES, *TABLE5_CLASSES)
# By which epoch a row of results.csv is: the last, or the best on the test set.
CHOICES = {
    "last": "last",
    "best_pixel_auroc": "best pixel AUROC",
    "best_pixel_pro": "best PRO",
    "best_image_auroc": "best image AUROC",
}


@dataclass(frozen=True)
class Variant:
    """A column of the paper's table: how it is trained, and where the paper's numbers are.

    Attributes:
        name: for our table.
        flags: of train.py.
        paper: (file, column, value) that selects the paper's rows.
    """

    name: str
    flags: tuple[str, ...]
    paper: tuple[str, str, str]


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: of it.
        classes: in the paper's order.
        variants: what is trained on each.
        columns: our metric -> the paper's column.
        datapath: where the data are by default.
    """

    title: str
    classes: tuple[str, ...]
    variants: tuple[Variant, ...]
    columns: dict[str, str] = field(
        default_factory=lambda: {"pixel_auroc": "pixel_auroc", "pixel_pro": "pro"}
    )
    datapath: str = "../mvtec_anomaly_detection"


def tables() -> dict[str, Table]:
    fnf = Variant("FNF", FNF, ("mvtec.csv", "method", "PyramidFlow FNF"))
    res18 = Variant("Res18", RES18, ("mvtec.csv", "method", "PyramidFlow Res18"))

    def ablation(name: str, *flags: str) -> Variant:
        return Variant(name, (*FNF, *flags), ("ablation.csv", "ablation", name))

    return {
        "table1": Table(
            "Table 1, volume normalization (FNF)",
            ("capsule", "pill", "toothbrush", "carpet", "grid", "zipper"),
            tuple(
                Variant(norm, (*FNF, "--volumeNorm", norm), ("volume_norm.csv", "volume_norm", norm))
                for norm in ("CVN", "SVN")
            ),
        ),
        "table2": Table(
            "Table 2 with S1 and S2, ablations (FNF)",
            MVTEC_CLASSES,
            (
                ablation("baseline"),
                ablation("I no volume normalization", "--volumeNorm", "none", "--loss", "likelihood"),
                ablation("II zero template", "--template", "zero"),
                ablation("III compose then difference", "--contrast", "composed"),
                ablation("IV spatial loss", "--loss", "spatial"),
            ),
        ),
        "table3": Table("Tables 3 and 5, MVTec AD", MVTEC_CLASSES, (fnf, res18)),
        "table4": Table(
            "Table 4, BTAD",
            ("01", "02", "03"),
            (Variant("Res18", RES18, ("btad.csv", "method", "PyramidFlow Res18")),),
            {"image_auroc": "image_auroc", "pixel_auroc": "pixel_auroc"},
            "../BTech_Dataset_transformed",
        ),
        "table5": Table("Table 5, MVTec AD", TABLE5_CLASSES, (fnf, res18)),
        "fig7": Table("Fig. 7", MVTEC_CLASSES, (fnf,)),
    }


def main() -> None:
    arguments = parse_arguments()
    if arguments.table == "fig5":
        command = [
            sys.executable,
            str(ROOT / "benchmark.py"),
            "memory",
            "--out",
            str(arguments.out / "fig5"),
        ]
        print(shown(command), flush=True)
        sys.exit(0 if arguments.dryRun else subprocess.run(command, check=False).returncode)
    table = tables()[arguments.table]
    arguments.datapath = (arguments.datapath or Path(table.datapath)).absolute()
    arguments.out = arguments.out.absolute()
    table = choose(table, arguments)
    check_more_flags(table, arguments.more)
    plan = plan_jobs(table, arguments)
    if arguments.dryRun:
        for entry in plan:
            finished = entry.job.run_folder()
            print(f"# finished: {finished}" if finished else shown(entry.job.command()))
        return
    check_writable(arguments.out, "--out")
    folder = arguments.out / arguments.table
    folder.mkdir(parents=True, exist_ok=True)
    failed = train(plan, arguments)
    rows = [row for entry in plan for row in result_rows(entry)]
    write_csv(folder / "results.csv", rows)
    text = markdown(table, plan, failed)
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nwritten to {folder}")
    if arguments.table == "fig7" or arguments.fig7:
        save_fig7(folder / "fig7.png", plan)
    if failed:
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("table", choices=(*tables(), "fig5"))
    parser.add_argument(
        "--datapath", type=Path, help="folder of the data set [as in train.py; table4: BTAD]"
    )
    parser.add_argument("--classes", nargs="+", help="of the table's classes [all of them]")
    parser.add_argument("--seeds", nargs="+", type=whole_number(0), default=[0], help="[0]")
    parser.add_argument(
        "--encoder",
        choices=("all", "none", "resnet18"),
        default="all",
        help="only this encoder's part [all]",
    )
    parser.add_argument("--epochs", type=whole_number(1), default=15, help="[15]")
    parser.add_argument(
        "--jobs",
        type=whole_number(0),
        default=0,
        help="trainings at once [one on each GPU, or one on the CPU]",
    )
    parser.add_argument(
        "--slurm", nargs="+", metavar="KEY=VALUE",
        help="run on a Slurm cluster, with these options of sbatch; time in minutes",
    )  # fmt: skip
    parser.add_argument("--dryRun", action="store_true", help="print the commands and stop")
    parser.add_argument("--fig7", action="store_true", help="also write the picture like Fig. 7")
    parser.add_argument("--out", type=Path, default=Path("reproduction"), help="folder [reproduction]")
    own, separator, more = _split(sys.argv[1:])
    arguments = parser.parse_intermixed_args(own)
    arguments.more = more if separator else []
    arguments.slurm = _options(parser, arguments.slurm)
    return arguments


def _split(words: list[str]) -> tuple[list[str], bool, list[str]]:
    """Before and after a lone --."""
    if "--" not in words:
        return words, False, []
    at = words.index("--")
    return words[:at], True, words[at + 1 :]


def _options(parser: argparse.ArgumentParser, given: list[str] | None) -> dict[str, str] | None:
    if given is None:
        return None
    for option in given:
        if "=" not in option:
            parser.error(f"--slurm {option}: write KEY=VALUE, such as partition=gpu")
    options = dict(option.split("=", 1) for option in given)
    if not options.get("time", "1").isdecimal():
        parser.error(f"--slurm time={options['time']}: a number of minutes")
    return options


# --------------------------------------------------------------------------------- what to run


@dataclass(frozen=True)
class Entry:
    """A cell of the table: one class, one variant, one seed, and the job that fills it."""

    cls: str
    variant: Variant
    seed: int
    job: Job


def choose(table: Table, arguments: argparse.Namespace) -> Table:
    """The part of the table that was asked for; classes that the paper lacks are compared with nothing.

    Raises:
        InputError: the data set lacks a class, or the table has no part with the encoder.
    """
    datapath = arguments.datapath
    present = list_classes(datapath, recognise(datapath))
    classes = tuple(arguments.classes or table.classes)
    if missing := [name for name in classes if name not in present]:
        raise InputError(
            f"{datapath} lacks {', '.join(missing)} (it has {', '.join(present) or 'no classes'}); name the data "
            "set by --datapath, or some classes by --classes"
        )
    encoders = {"all": ("none", "resnet18"), "none": ("none",), "resnet18": ("resnet18",)}
    variants = tuple(v for v in table.variants if v.flags[1] in encoders[arguments.encoder])
    if not variants:
        raise InputError(f"{table.title} has no part with --encoder {arguments.encoder}")
    return Table(table.title, classes, variants, table.columns, table.datapath)


def check_more_flags(table: Table, more: list[str]) -> None:
    """Raises InputError if a flag after -- is one that the table sets itself."""
    _, given = parse_settings("", more)
    own = {flag[2:] for variant in table.variants for flag in variant.flags if flag.startswith("--")}
    own |= {"cls", "epochs", "seed", "datapath", "saveDir", "resume"}
    for name in given:
        if name in own:
            raise InputError(f"--{name} after --: the table sets it itself; leave it out")
    visible_gpus(more)


def plan_jobs(table: Table, arguments: argparse.Namespace) -> list[Entry]:
    """Entries of the table; equal trainings are the same job, in this table and in others."""
    entries, jobs = [], {}
    for variant in table.variants:
        for name in table.classes:
            for seed in arguments.seeds:
                flags = [
                    "--cls",
                    name,
                    *variant.flags,
                    "--epochs",
                    str(arguments.epochs),
                    "--seed",
                    str(seed),
                ]
                flags += ["--datapath", str(arguments.datapath), *arguments.more]
                key = training_key(flags)
                if key not in jobs:
                    folder = arguments.out / "jobs" / f"{name}-seed{seed}-{key}"
                    jobs[key] = Job(f"{variant.name}, {name}, seed {seed}", flags, folder)
                entries.append(Entry(name, variant, seed, jobs[key]))
    return entries


def training_key(flags: list[str]) -> str:
    """The same for flags that give the same training."""
    settings, _ = parse_settings("", flags)
    config = model_config(settings)
    about = asdict(settings) | config.to_dict() | {"augment": augmentation(settings, config)}
    for name in (
        "imageSize",
        "numLayer",
        "volumeNorm",
        "gpu",
        "numWorkers",
        "cache",
        "saveDir",
        "tensorboard",
    ):
        about.pop(name)  # `auto` is settled in the configuration, and the rest changes no number
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]


def train(plan: list[Entry], arguments: argparse.Namespace) -> list[Job]:
    """Run the jobs; those that failed."""
    jobs = list({entry.job.folder: entry.job for entry in plan}.values())
    done = sum(job.result() is not None for job in jobs)
    print(f"{len(jobs)} trainings, {done} of them finished already", flush=True)

    def report(job: Job, what: str) -> None:
        nonlocal done
        done += what == "done"
        result = job.result()
        values = ""
        if result:
            values = ": " + ", ".join(
                f"{METRIC_NAMES[m]} {percent(result['last'][m])}" for m in METRIC_NAMES
            )
        where = f" (see {job.log})" if "failed" in what else ""
        print(f"[{done}/{len(jobs)}] {job.name} {what}{values}{where}", flush=True)

    machines = Machines(visible_gpus(arguments.more), arguments.jobs, arguments.slurm)
    try:
        with StopRequest(), (arguments.out / "lock").open("a") as file:
            if not lock(file):
                raise InputError(
                    f"another reproduce.py works in {arguments.out}; wait for it, or name another --out"
                )
            return run_jobs(jobs, machines, arguments.out / "submitit", report)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command again goes on with what is missing") from None


def visible_gpus(flags: list[str]) -> tuple[str, ...]:
    """The GPUs for the jobs, as in CUDA_VISIBLE_DEVICES; none with `--gpu cpu`.

    Raises:
        InputError: the flags choose a GPU, which would be the same for all jobs.
    """
    _, given = parse_settings("", flags)
    if given.get("gpu") == "cpu":
        return ()
    if "gpu" in given:
        raise InputError(
            "--gpu: the jobs take all GPUs; choose some by CUDA_VISIBLE_DEVICES, or --gpu cpu"
        )
    count, names = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(names.split(",")[:count] if names else map(str, range(count)))


# ------------------------------------------------------------------------------------- results


def result_rows(entry: Entry) -> list[dict]:
    """Rows of results.csv: one for each choice of the epoch, or one that says that the job failed."""
    common = {"variant": entry.variant.name, "class": entry.cls, "seed": entry.seed}
    result, folder = entry.job.result(), entry.job.run_folder()
    if result is None:
        empty = dict.fromkeys(("epoch", *METRIC_NAMES))
        return [{**common, "choice": "failed", **empty, "folder": str(entry.job.log)}]
    return [
        {
            **common,
            "choice": label,
            **{key: result[choice][key] for key in ("epoch", *METRIC_NAMES)},
            "folder": str(folder),
        }
        for choice, label in CHOICES.items()
        if result.get(choice)
    ]


def read_paper(variant: Variant) -> dict[str, dict[str, float]]:
    """class -> column -> percent."""
    name, column, value = variant.paper
    with (PAPER_TABLES / name).open(newline="") as file:
        return {
            row["class"]: {k: float(v) for k, v in row.items() if k not in (column, "class", "table")}
            for row in csv.DictReader(file)
            if row[column] == value
        }


def markdown(table: Table, plan: list[Entry], failed: list[Job]) -> str:
    """The whole table, percent: ours, the paper's, the difference."""
    seeds = sorted({entry.seed for entry in plan})
    lines = [f"## {table.title}", ""]
    lines.append(
        f"Percent; seeds {', '.join(map(str, seeds))}{'; mean ± standard deviation' if len(seeds) > 1 else ''}. "
        "*Epoch chosen on the test set, as in the paper's program; quote the last. Difference: last - paper."
    )
    for variant in table.variants:
        entries = [entry for entry in plan if entry.variant == variant]
        lines += ["", f"### {variant.name}", "", *variant_table(table, variant, entries)]
    if failed:
        lines += ["", "Failed:", ""]
        lines += [f"- {job.name}: see {job.log}" for job in failed]
    return "\n".join(lines)


def variant_table(table: Table, variant: Variant, entries: list[Entry]) -> list[str]:
    """A row for each class, and for each group of classes that is complete."""
    labels = [METRIC_NAMES[metric] for metric in table.columns]
    titles = [
        f"{label}{kind}" for kind in ("", ", best*", ", paper", ", difference") for label in labels
    ]
    lines = ["| class | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    paper = read_paper(variant)
    results = {}
    for entry in entries:
        results.setdefault(entry.cls, {})[entry.seed] = entry.job.result()
    for name, group in [(name, (name,)) for name in table.classes] + groups(table):
        last = _means(results, group, table, lambda metric: "last")
        best = _means(results, group, table, lambda metric: f"best_{metric}")
        theirs = [
            statistics.mean(paper[c][column] for c in group) if all(c in paper for c in group) else None
            for column in table.columns.values()
        ]
        differences = [
            f"{statistics.mean(ours) - their:+.1f}" if ours and their is not None else "n/a"
            for ours, their in zip(last, theirs, strict=True)
        ]
        failed = not all(any(results[c].values()) for c in group)
        cells = [_spread(values, "failed" if failed else "n/a") for values in (*last, *best)]
        cells += ["n/a" if x is None else f"{x:.1f}" for x in theirs]
        lines.append("| " + " | ".join([name, *cells, *differences]) + " |")
    return lines


def groups(table: Table) -> list[tuple[str, tuple[str, ...]]]:
    """(name, classes) of the means below a table: of the paper's groups that it holds entirely."""
    textures = MVTEC_TEXTURES
    objects = tuple(name for name in MVTEC_CLASSES if name not in textures)
    known = [
        ("mean of Table 3's 12", TABLE3_CLASSES),
        ("mean of all 15", MVTEC_CLASSES),
        ("mean of 5 textures", textures),
        ("mean of 10 objects", objects),
    ]
    complete = [(name, classes) for name, classes in known if set(classes) <= set(table.classes)]
    own = (f"mean of {len(table.classes)}", table.classes)
    if len(table.classes) > 1 and not any(set(table.classes) == set(classes) for _, classes in complete):
        complete.append(own)
    return complete


def _means(
    results: dict, group: Iterable[str], table: Table, choice: Callable[[str], str]
) -> list[list[float]]:
    """For each metric: over the group's classes, one mean for each seed that finished all of them; percent."""
    group = list(group)
    seeds = sorted({seed for name in group for seed in results[name]})
    columns = []
    for metric in table.columns:
        values = []
        for seed in seeds:
            found = [(results[name].get(seed) or {}).get(choice(metric)) for name in group]
            numbers = [100 * row[metric] for row in found if row and row[metric] is not None]
            if len(numbers) == len(group):
                values.append(statistics.mean(numbers))
        columns.append(values)
    return columns


def _spread(values: list[float], otherwise: str) -> str:
    if not values:
        return otherwise
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def save_fig7(path: Path, plan: list[Entry]) -> None:
    """Image, template, map and truth of one defective image of each class, below one another (Fig. 7)."""
    panels = []
    for entry in plan:
        folder = entry.job.run_folder()
        if folder is None or entry.seed != plan[0].seed or entry.variant != plan[0].variant:
            continue
        found = sorted(p for p in (folder / "pictures").glob("*/*.png") if p.parent.name != "good")
        panels += found[:1]
    if panels:
        pictures.save_stack(path, panels)
        print(f"picture {path}")


if __name__ == "__main__":
    run_script(main)
