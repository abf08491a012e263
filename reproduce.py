"""Train what a table of the paper needs, and print our numbers beside the paper's.

    python reproduce.py table3 --datapath ../mvtec_anomaly_detection           # MVTec AD, FNF and Res18
    python reproduce.py table2 --classes screw --seeds 0 1 2 --encoder none    # the ablations on one class
    python reproduce.py table4 --datapath ../BTech_Dataset_transformed         # BTAD
    python reproduce.py table3 --jobs 8                                        # eight at once
    python reproduce.py table3 --slurm partition=gpu gres=gpu:1 time=240       # on a cluster
    python reproduce.py fig5; python reproduce.py fig7 --classes tile screw    # memory; the pictures
    python reproduce.py table2 --classes screw -- --numLayer 4                 # more flags for every train.py
    python reproduce.py plus --datapath DATA MORE_DATA --classes screw cookie --epochs screw=3 cookie=8 \\
        --seeds 0 1 2                                                          # one template against a bank

The tables are trained in the official program's precision, torch's default: fp32, with tf32 convolutions
where this machine has NVIDIA GPUs from Ampere on; -- --precision tf32 says so for a cluster's.

Written to --out: <table>/results.csv (a row for each class, seed and choice of the epoch), <table>/table.md,
and jobs/, whose finished trainings all tables share; those of plus are for one --numTemplate.  The same command
again completes what is missing.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import figures
import train
import util
from dataset import MVTEC_TEXTURES, list_classes, recognize
from fit import options_of_flags
from jobs import Job, Machines, run_jobs, shown
from metrics import METRICS, TABLE_METRICS
from scorer import MOST_TEMPLATES, ScoreOptions
from util import InputError, Interrupted, Parser, percent, whole_number

ROOT = Path(__file__).parent
PAPER_TABLES = ROOT / "paper_tables"
PAPER_COLUMNS = {"pixel_auroc": "pixel_auroc", "pixel_pro": "pro", "image_auroc": "image_auroc"}
FNF = ("--encoder", "none", "--augment", "none")  # the paper's FNF rows are without augmentation
RES18 = ("--encoder", "resnet18")
TABLE1_CLASSES = ("capsule", "pill", "toothbrush", "carpet", "grid", "zipper")
TABLE3_CLASSES = (
    "carpet", "leather", "tile", "wood", "bottle", "cable", "capsule", "hazelnut", "pill", "toothbrush",
    "transistor", "zipper",
)  # fmt: skip
TABLE5_CLASSES = ("grid", "metal_nut", "screw")
MVTEC_CLASSES = (*TABLE3_CLASSES, *TABLE5_CLASSES)
MVTEC_OBJECTS = tuple(name for name in MVTEC_CLASSES if name not in MVTEC_TEXTURES)
GROUPS = {
    "mean of Table 3's 12": TABLE3_CLASSES,
    "mean of all 15": MVTEC_CLASSES,
    "mean of 5 textures": MVTEC_TEXTURES,
    "mean of 10 objects": MVTEC_OBJECTS,
}
# Which epoch a row of results.csv is of: the last, or the best on the test set.
CHOICES = {
    "last": "last",
    "last_paper": "last",
    "best_pixel_auroc": "best pixel AUROC",
    "best_pixel_pro": "best PRO",
    "best_image_auroc": "best image AUROC",
}
# Flags of train.py that change no number, or that the configuration settles.
NOT_IN_KEY = (
    "imageSize", "numLayer", "volumeNorm", "gpu", "numWorkers", "cache", "saveDir", "tensorboard", "config",
    "resume", "map_size",  # which --mapSize says
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A column of the paper's table: how it is trained, and where the paper's numbers are."""

    name: str
    flags: tuple[str, ...]  # of train.py
    paper: tuple[str, str]  # (column, value) of the rows in paper_tables/


@dataclass(frozen=True)
class Table:
    """A table of the paper; or `plus`, which is ours."""

    title: str
    classes: tuple[str, ...]  # in the paper's order; none: all that the data have
    variants: tuple[Variant, ...]
    metrics: tuple[str, ...] = ("pixel_auroc", "pixel_pro")
    datapath: str = "../mvtec_anomaly_detection"
    plus: bool = False  # compare the paper's score with the bank's, of the same weights


def tables() -> dict[str, Table]:
    fnf = Variant("FNF", FNF, ("method", "PyramidFlow FNF"))
    res18 = Variant("Res18", RES18, ("method", "PyramidFlow Res18"))
    both = (fnf, res18)

    def volume_norm(name: str) -> Variant:
        return Variant(name, (*FNF, "--volumeNorm", name), ("volume_norm", name))

    def ablation(name: str, *flags: str) -> Variant:
        return Variant(name, (*FNF, *flags), ("ablation", name))

    volume_norms = (volume_norm("CVN"), volume_norm("SVN"))
    ablations = (
        ablation("baseline"),
        ablation("I no volume normalization", "--volumeNorm", "none", "--loss", "likelihood"),
        ablation("II zero template", "--template", "zero"),
        ablation("III compose then difference", "--contrast", "composed"),
        ablation("IV spatial loss", "--loss", "spatial"),
    )
    btad = ("01", "02", "03"), (res18,), ("image_auroc", "pixel_auroc"), "../BTech_Dataset_transformed"
    of_plus = ("pixel_auroc", "pixel_pro", "pixel_pro_limited", "image_auroc", "image_ap")
    return {
        "table1": Table("Table 1, volume normalization (FNF)", TABLE1_CLASSES, volume_norms),
        "table2": Table("Table 2 with S1 and S2, ablations (FNF)", MVTEC_CLASSES, ablations),
        "table3": Table("Tables 3 and 5, MVTec AD", MVTEC_CLASSES, both),
        "table4": Table("Table 4, BTAD", *btad),
        "table5": Table("Table 5, MVTec AD", TABLE5_CLASSES, both),
        "fig7": Table("Fig. 7", MVTEC_CLASSES, (fnf,)),
        "plus": Table("Beyond the paper: a bank of templates", (), both, of_plus, plus=True),
    }


def main() -> None:
    args = parse_arguments()
    if args.table == "fig5":
        sys.exit(run_fig5(args))
    table = choose(tables()[args.table], args)
    check_more_flags(table, args.given)
    plan = plan_jobs(table, args)
    if args.dryRun:
        for entry in plan:
            print(dry_line(entry.job))
        return
    util.check_writable(args.out, "--out")
    folder = args.out / args.table
    folder.mkdir(parents=True, exist_ok=True)
    failed = run(plan, args)
    util.write_csv(folder / "results.csv", [row for entry in plan for row in result_rows(entry)])
    text = markdown(table, plan, failed, args)
    util.write_text(folder / "table.md", text + "\n")
    print(f"\n{text}\n\nwritten to {folder}")
    if args.table == "fig7" or args.fig7:
        save_fig7(folder / "fig7.png", plan)
    if failed:
        sys.exit(1)


def run_fig5(args: argparse.Namespace) -> int:
    """The memory curves of Fig. 5, by a script of their own; its exit code."""
    command = [sys.executable, "-m", "benchmarks.memory", "--out", str(args.out / "fig5")]
    print(shown(command), flush=True)
    return 0 if args.dryRun else subprocess.run(command, check=False, cwd=ROOT).returncode


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("table", choices=(*tables(), "fig5"))
    add("--datapath", type=Path, nargs="+", action="extend", metavar="FOLDER",
        help="data sets; a class is taken from the first that has it; else the table's")
    add("--classes", nargs="+", metavar="CLASS", help="of the data; else the table's, for plus all")
    add("--seeds", nargs="+", type=whole_number(0), default=[0], metavar="N",
        help="of the trainings; of several the table has means and standard deviations")
    add("--encoder", choices=("all", "none", "resnet18"),
        help="only the part with this encoder; else all, for plus none")
    add("--epochs", nargs="+", type=class_epochs, default=(), metavar="N",
        help="of all classes, or CLASS=N of some; else 15")
    add("--jobs", type=whole_number(0), default=0,
        help="trainings at once; 0: one on each GPU, or one on the CPU")
    add("--slurm", nargs="+", type=slurm_option, metavar="KEY=VALUE",
        help="run on a Slurm cluster, with these options of sbatch; time in minutes")
    add("--numTemplate", type=whole_number(2, MOST_TEMPLATES), default=ScoreOptions().num_template, metavar="K",
        help="templates of the bank of plus")
    add("--dryRun", action="store_true", help="print the commands and stop")
    add("--fig7", action="store_true", help="also write the picture like Fig. 7")
    add("--out", type=Path, default=Path("reproduction"), help="folder of the results")
    # fmt: on
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args = parser.parse_intermixed_args(words[:at])
    args.more, args.out = words[at + 1 :], args.out.absolute()
    args.given = train.given_flags(args.more)
    args.epochs = {"": 15, **dict(args.epochs)}
    args.slurm = None if args.slurm is None else dict(args.slurm)
    return args


def class_epochs(text: str) -> tuple[str, int]:
    """An argparse type: N, as ("", N), or CLASS=N."""
    name, _, count = text.rpartition("=")
    return name, whole_number(1)(count)


def slurm_option(text: str) -> tuple[str, str]:
    """An argparse type: KEY=VALUE."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text}: write KEY=VALUE, such as partition=gpu")
    if key == "time" and not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: write a number of minutes")
    return key, value


# --------------------------------------------------------------------------------- what to run


@dataclass(frozen=True)
class Entry:
    """A cell of the table: one class, one variant, one seed, and the job that fills it."""

    cls: str
    variant: Variant
    seed: int
    job: Job


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def choose(table: Table, args: argparse.Namespace) -> Table:
    """The part of the table that was asked for; classes that the paper lacks are compared with nothing.

    `args.folders` becomes the data set of each class, `args.epochs` its epochs.

    Raises:
        InputError: the data lack a class, or the table has no part with the encoder.
    """
    args.folders = {}
    datapaths = [path.absolute() for path in args.datapath or [Path(table.datapath)]]
    for datapath in datapaths:
        dataset = recognize(datapath)
        tested = list_classes(datapath, dataset, "test")
        for name in filter(tested.__contains__, list_classes(datapath, dataset)):
            args.folders.setdefault(name, datapath)
    classes = tuple(args.classes or table.classes or args.folders)
    encoder = args.encoder or ("none" if table.plus else "all")
    variants = tuple(v for v in table.variants if encoder in ("all", v.flags[1]))
    where, have = " ".join(map(str, datapaths)), ", ".join(args.folders) or "no classes"
    lacking = ", ".join(name for name in classes if name not in args.folders)
    unknown = sorted(args.epochs.keys() - {"", *classes})
    for wrong, message in (
        (lacking, f"{where} lacks {lacking} (it has {have}); choose the data set by --datapath, or some classes "
         "by --classes"),
        (not classes, f"no classes in --datapath {where}; choose a data set's folder"),
        (unknown, f"--epochs {''.join(unknown[:1])}=...: not one of the classes {', '.join(classes)}"),
        (not variants, f"{table.title} has no part with --encoder {args.encoder}; leave it out"),
    ):  # fmt: skip
        if wrong:
            raise InputError(message)
    args.epochs = {name: args.epochs.get(name, args.epochs[""]) for name in classes}
    return replace(table, classes=tuple(dict.fromkeys(classes)), variants=variants)


def check_more_flags(table: Table, given: dict) -> None:
    """Raises InputError if a flag after -- is one that the table sets itself."""
    own = {flag[2:] for variant in table.variants for flag in variant.flags if flag.startswith("--")}
    own |= {"cls", "epochs", "seed", "datapath", "good", "bad", "masks", "saveDir", "resume", "config"}
    own |= {"proLimit", "score", "numTemplate"}
    for name in given:
        if name in own:
            raise InputError(f"--{name} after --: the table sets it itself; leave it out")
    if given.get("gpu", "cpu") != "cpu":
        raise InputError("--gpu: the jobs take all GPUs; choose some by CUDA_VISIBLE_DEVICES, or --gpu cpu")


def visible_gpus(given: dict) -> tuple[str, ...]:
    """The GPUs for the jobs, as in CUDA_VISIBLE_DEVICES; none with `--gpu cpu`."""
    count = 0 if "gpu" in given else torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return tuple(names.split(",")[:count])


def plan_jobs(table: Table, args: argparse.Namespace) -> list[Entry]:
    """Entries of the table; equal trainings are the same job, in this table and in others."""
    more = [*args.more, *faithful_flags(table, args.given)]
    entries, jobs = [], {}
    for variant, name, seed in itertools.product(table.variants, table.classes, args.seeds):
        epochs = str(args.epochs[name])
        flags = ["--cls", name, *variant.flags, "--epochs", epochs, "--seed", str(seed)]
        if table.plus:
            flags += ["--score", "bank", "--numTemplate", str(args.numTemplate)]
        if table.plus and "evalEvery" not in args.given:
            flags += ["--evalEvery", epochs]  # only the last epoch is quoted
        flags += ["--datapath", str(args.folders[name]), *more]
        key = training_key(flags)
        folder = args.out / "jobs" / f"{name}-seed{seed}-{key}"
        job = jobs.setdefault(key, Job(f"{variant.name}, {name}, seed {seed}", flags, folder))
        entries.append(Entry(name, variant, seed, job))
    return entries


def faithful_flags(table: Table, given: dict) -> list[str]:
    """The precision of the official program, torch's default: tf32 convolutions where the GPU has them."""
    if table.plus or "precision" in given:
        return []
    try:
        device = torch.device("cuda" if visible_gpus(given) else "cpu")
        return ["--precision", util.choose_precision("tf32", device)]
    except InputError:
        return ["--precision", "fp32"]


def training_key(flags: list[str]) -> str:
    """The same for flags that give the same training."""
    args = train.parse_arguments(flags)
    about = vars(args) | asdict(train.model_config(args))
    about["saveMemory"] = about["save_memory"]  # auto, the default, changes no number
    unread = ("numTemplate", "whiten", "smooth") if args.score == "paper" else ()
    default = train.make_parser().get_default
    about["imageScore"] = options_of_flags(args).image_score
    unread += tuple(name for name in train.ADDED_FLAGS if about[name] == default(name))
    unread += ("imageScore",) if about["imageScore"] == "max" else ()  # what it was before auto
    about = {name: value for name, value in about.items() if name not in (*NOT_IN_KEY, *unread)}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]


def dry_line(job: Job) -> str:
    """For --dryRun: the command of a job, or where its result is."""
    if result := job.result():
        return f"# finished: {result['folder']}"
    return shown([sys.executable, str(ROOT / "train.py"), *job.training_flags()])


def run(plan: list[Entry], args: argparse.Namespace) -> list[Job]:
    """Run the jobs; those that failed."""
    jobs = list({entry.job.folder: entry.job for entry in plan}.values())
    done = sum(job.result() is not None for job in jobs)
    print(f"{len(jobs)} trainings, {done} of them finished already", flush=True)

    def report(job: Job, what: str) -> None:
        nonlocal done
        done += what == "done"
        values = ""
        if result := job.result():
            values = ", ".join(f"{METRICS[m]} {percent(result['last'][m])}" for m in TABLE_METRICS)
        where = f" (see {job.log})" if what.startswith("failed") else ""
        print(f"[{done}/{len(jobs)}] {job.name} {what}{': ' * bool(values)}{values}{where}", flush=True)

    machines = Machines(visible_gpus(args.given), args.jobs, args.slurm)
    try:
        with util.StopSignals() as stop, (args.out / "lock").open("a") as file:
            if not util.lock(file):
                raise InputError(f"another reproduce.py works in {args.out}; wait for it, or choose another --out")
            return run_jobs(jobs, machines, args.out / "slurm", report, stop.check)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command again completes what is missing") from None


# ------------------------------------------------------------------------------------- results


def result_rows(entry: Entry) -> list[dict]:
    """Rows of results.csv: one for each choice of the epoch, or one that says that the job failed."""
    common = {"variant": entry.variant.name, "class": entry.cls, "seed": entry.seed}
    names, result = ("score", "epoch", *METRICS), entry.job.result()
    if result is None:
        return [{**common, "choice": "failed", **dict.fromkeys(names), "folder": str(entry.job.log)}]
    return [
        {**common, "choice": label, **{n: result[choice][n] for n in names}, "folder": result["folder"]}
        for choice, label in CHOICES.items()
        if result.get(choice)
    ]


def read_paper(variant: Variant) -> dict[str, dict[str, float]]:
    """class -> metric -> percent."""
    column, value = variant.paper
    rows = (row for path in sorted(PAPER_TABLES.glob("*.csv")) for row in read_csv(path))
    return {
        row["class"]: {key: float(row[name]) for key, name in PAPER_COLUMNS.items() if name in row}
        for row in rows
        if row.get(column) == value
    }


def markdown(table: Table, plan: list[Entry], failed: list[Job], args: argparse.Namespace) -> str:
    """The whole table, percent."""
    epochs = {args.epochs[name] for name in table.classes}
    epochs = epochs if len(epochs) == 1 else (f"{name} {args.epochs[name]}" for name in table.classes)
    about = [
        f"seeds {', '.join(map(str, args.seeds))}" + "; mean ± standard deviation" * (len(args.seeds) > 1),
        f"epochs {', '.join(map(str, epochs))}",
        "last epoch, nothing chosen on the test set; both scores from the same weights"
        if table.plus
        else "*epoch chosen on the test set, as in the paper's program, quote the last; difference: last - paper",
    ]
    lines = [f"## {table.title}", "", f"Percent; {'; '.join(about)}."]
    for variant in table.variants:
        results = {name: {} for name in table.classes}
        for entry in plan:
            if entry.variant == variant:
                results[entry.cls][entry.seed] = entry.job.result()
        rows = (bank_rows if table.plus else paper_rows)(table, results, read_paper(variant))
        lines += ["", f"### {variant.name}", "", util.markdown_table(next(rows), rows)]
    if failed:
        lines += ["", "Failed:", ""]
        lines += [f"- {job.name}: {job.reason()} (see {job.log})" for job in failed]
    return "\n".join(lines)


Results = dict[str, dict[int, dict | None]]  # by class and seed


def paper_rows(table: Table, results: Results, paper: dict) -> Iterator[list[str]]:
    """The header, then ours, the paper's and the difference, for each class and each group of classes."""
    kinds = ("", ", best*", ", paper", ", difference")
    yield ["class", *(METRICS[metric] + kind for kind in kinds for metric in table.metrics)]
    for name, group in groups(table):
        last = [seed_means(results, group, "last", metric) for metric in table.metrics]
        best = [seed_means(results, group, f"best_{metric}", metric) for metric in table.metrics]
        theirs = [paper_mean(paper, group, metric) for metric in table.metrics]
        pairs = zip(last, theirs, strict=True)
        gained = [[statistics.mean(a.values()) - b[0]] if a and b else [] for a, b in pairs]
        ours = [spread(values.values(), missing(results, group)) for values in (*last, *best)]
        yield [name, *ours, *map(spread, theirs), *(spread(values, sign="+") for values in gained)]


def bank_rows(table: Table, results: Results, paper: dict) -> Iterator[list[str]]:
    """The header, then the published score, that of one template, and that of the bank, one below the other."""
    yield ["class", "score", *(METRICS[metric] for metric in table.metrics)]
    for name, group in groups(table):
        one = [seed_means(results, group, "last_paper", metric) for metric in table.metrics]
        bank = [seed_means(results, group, "last", metric) for metric in table.metrics]
        pairs = zip(one, bank, strict=True)
        gained = [[b[seed] - a[seed] for seed in b if seed in a] for a, b in pairs]
        published = [paper_mean(paper, group, metric) for metric in table.metrics]
        if any(published):
            yield [name, "published", *map(spread, published)]
        otherwise = missing(results, group)
        yield [name, "paper", *(spread(values.values(), otherwise) for values in one)]
        yield [name, "bank", *(spread(values.values(), otherwise) for values in bank)]
        yield [name, "bank - paper", *(spread(values, otherwise, "+") for values in gained)]


def groups(table: Table) -> list[tuple[str, tuple[str, ...]]]:
    """(name, classes) of a table's rows: each class, and the paper's groups that it holds entirely."""
    mine = set(table.classes)
    complete = [(name, classes) for name, classes in GROUPS.items() if set(classes) <= mine]
    if len(mine) > 1 and not any(set(classes) == mine for _, classes in complete):
        complete.append((f"mean of {len(mine)}", table.classes))
    return [(name, (name,)) for name in table.classes] + complete


def seed_means(results: Results, group: Iterable[str], choice: str, metric: str) -> dict[int, float]:
    """For each seed that finished all of the group's classes, their mean; percent."""
    group, means = list(group), {}
    for seed in results[group[0]]:
        rows = [(results[name].get(seed) or {}).get(choice) for name in group]
        values = [100 * row[metric] for row in rows if row and row[metric] is not None]
        if len(values) == len(group):
            means[seed] = statistics.mean(values)
    return means


def paper_mean(paper: dict, group: Iterable[str], metric: str) -> list[float]:
    """The paper's mean, alone, or nothing where it lacks a class."""
    values = [paper.get(name, {}).get(metric) for name in group]
    return [] if None in values else [statistics.mean(values)]


def missing(results: Results, group: Iterable[str]) -> str:
    """What stands where a number is missing."""
    return "n/a" if all(any(results[name].values()) for name in group) else "failed"


def spread(values: Iterable[float], otherwise: str = "n/a", sign: str = "") -> str:
    """The mean of the seeds, with their standard deviation if there are several."""
    values = list(values)
    if not values:
        return otherwise
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{deviation}"


def save_fig7(path: Path, plan: list[Entry]) -> None:
    """Image, template, map and truth of one defective image of each class, below one another (Fig. 7)."""
    panels = []
    for entry in plan:
        result = entry.job.result()
        if result and entry.seed == plan[0].seed and entry.variant == plan[0].variant:
            found = sorted((result["folder"] / "pictures").glob("*/*.png"))
            panels += [picture for picture in found if picture.parent.name != "good"][:1]
    if panels:
        figures.save_stack(path, panels)
        print(f"picture {path}")


if __name__ == "__main__":
    util.run_script(main)
