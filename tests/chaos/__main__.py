"""The long form of the chaos, and the judge of its history: `make chaos`, or

    python -m tests.chaos [--seed 7] [--jobs 1500] [--only recovery] [--out chaos-output]
    python -m tests.chaos --check chaos-output/storm/history.jsonl

Breaks a whole service on this machine in every way it knows, while pictures are handed in; prints a table of what was
promised and what happened, and leaves the histories and the figures in the output folder.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from shared.terminal import print_table
from tests.chaos import run
from tests.chaos.checker import check
from tests.chaos.history import read
from tests.chaos.world import SHARED, World

Row = tuple[str, str, str, str]
"""Promise, what was done, what happened, whether it was kept."""

RECOVERY_BOUND_SECONDS = 30.0
SUBMIT_BOUND_SECONDS = 0.25


PARTS = ("controls", "storm", "recovery")


@click.command()
@click.option("--seed", default=1, show_default=True, help="Decides the order of things, not their timing.")
@click.option("--jobs", default=1500, show_default=True, type=click.IntRange(50), help="Pictures handed in.")
@click.option("--share", default=1.0, show_default=True, help="How much of the storm's plan of faults is carried out.")
@click.option("--kills", default=50, show_default=True, type=click.IntRange(2), help="Kills that recovery is timed by.")
@click.option("--out", default="chaos-output", show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--only", "parts", multiple=True, type=click.Choice(PARTS), help="Only these parts; can be given twice.")
@click.option("--check", "checked", type=click.Path(exists=True, path_type=Path), help="Only judge this history.")
@click.option("--quiet", is_flag=True, help="Do not tell each fault.")
def main(
    seed: int, jobs: int, share: float, kills: int, out: Path, parts: tuple[str, ...], checked: Path | None, quiet: bool
) -> None:
    """Break Enlarger for some minutes and see whether it keeps its promises."""
    if checked is not None:
        violations = check(read(checked))
        for violation in violations:
            click.echo(violation)
        click.echo(f"{len(violations)} violations.")
        sys.exit(bool(violations))
    began = time.monotonic()

    def tell(sentence: str) -> None:
        if not quiet:
            click.echo(f"{time.monotonic() - began:7.1f} s  {sentence}")

    works: dict[str, Callable[[Path], dict[str, Any]]] = {
        "controls": lambda folder: controls(folder, seed=seed, tell=tell),
        "storm": lambda folder: storm(folder, seed=seed, jobs=jobs, share=share, tell=tell),
        "recovery": lambda folder: recovery(folder, seed=seed, kills=kills, tell=tell),
    }
    rows: list[Row] = []
    for part in parts or PARTS:
        shutil.rmtree(out / part, ignore_errors=True)
        (out / part).mkdir(parents=True)
        part_began = time.monotonic()
        made = works[part](out / part) | {"seed": seed, "commit": _commit(), "machine": _machine()}
        made["minutes"] = round((time.monotonic() - part_began) / 60, 1)
        (out / part / "figures.json").write_text(json.dumps(made, indent=2) + "\n")
        rows += VERDICTS[part](made)
        for violation in made.get("violations", ()):
            click.echo(violation)
        click.echo(f"{part}: {made['minutes']} minutes.")
    print_table(("promise", "what was done", "what happened", "kept"), rows)
    click.echo(f"Seed {seed}, commit {_commit()}, {_machine()}. Histories and figures: {out}")
    (out / "table.md").write_text(_markdown(rows))
    sys.exit(any(row[3] != "yes" for row in rows))


def controls(folder: Path, *, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """With a mechanism switched off the checker has to object: how often it did."""
    tell("Control: neither relay nor rescue.")
    lost = [v for v in run.without_relay(folder / "without-relay", seed=seed) if v.promise == "G1"]
    tell("Control: no fence.")
    doubled = [v for v in run.without_fence(folder / "without-fence", seed=seed) if v.promise == "G2"]
    return {"lost_without_relay": len(lost), "double_effects_without_fence": len(doubled)}


def storm(folder: Path, *, seed: int, jobs: int, share: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """Everything is broken, often, under load."""
    plan = {name: max(1, round(times * share)) for name, times in run.LONG.items()}
    with World(folder, seed=seed, sql="postgresql", image_processes=3, tell=tell, **SHARED) as world:
        run.submits_without_redis(world, count=50)
        run.storm(world, plan, jobs=jobs, poison=max(10, jobs // 150), longest_fault_seconds=1.5)
        run.lose_helpers(world, kills=max(1, round(10 * share)), stops=max(1, round(5 * share)))
        tell("Nothing is broken any more; the rest is waited for.")
        world.settle()
        violations = [str(violation) for violation in check(world.history)]
        refused = world.refused_late_writes()
        return run.figures(world.history) | {"late_writes_refused": refused, "violations": violations}


def recovery(folder: Path, *, seed: int, kills: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Kills in mid-job, with the product's own settings."""
    lives = run.default_lives()
    with World(folder, seed=seed, image_processes=8, tile_seconds=0.25, receiver_faults=0, tell=tell, **lives) as world:
        run.kill_in_mid_job(world, kills=kills)
        world.settle()
        violations = [str(violation) for violation in check(world.history)]
        return run.figures(world.history) | {"violations": violations}


def judge_controls(made: dict[str, Any]) -> list[Row]:
    """A control is right when what it switches off is missed."""
    lost, doubled = made["lost_without_relay"], made["double_effects_without_fence"]
    return [
        ("G1 control", "relay and rescue off", f"{lost} jobs lost, as there must be", _yes(lost > 0)),
        ("G2 control", "fence off", f"{doubled} double effects, as there must be", _yes(doubled > 0)),
    ]


def judge_storm(made: dict[str, Any]) -> list[Row]:
    broken = Counter(violation.split()[0] for violation in made["violations"])
    faults: dict[str, int] = made["faults"]

    def on(server: str) -> str:
        killed = faults.get(f"kill {server}", 0)
        others = sum(n for kind, n in faults.items() if kind.endswith(f" {server}") and not kind.startswith("kill"))
        return f"killed {killed} times, frozen, cut off, slow, mute, wiped {others} times"

    submits = made["measures"]
    slowest = max(submits, key=lambda name: submits[name]["p99"])
    p99 = submits[slowest]["p99"]
    return [
        (
            "G1",
            f"{sum(made['jobs'].values())} jobs, {made['kills']} SIGKILLs of every process and server",
            f"{broken['G1']} lost; {_listed(made['jobs'])}",
            _yes(not broken["G1"]),
        ),
        (
            "G2",
            f"{made['stops_in_mid_job']} SIGSTOPs of twice the lease in mid-job",
            f"{broken['G2']} double effects or wrong changes; {made['late_writes_refused']} late writes refused",
            _yes(not broken["G2"] and made["late_writes_refused"] > 0),
        ),
        (
            "G2",
            f"{made['shards_made']} shards of shared pictures, {made['helpers_lost']} helpers killed or stopped in one",
            f"{made['shards_taken_again']} made by another after all; results as by one worker",
            _yes(not broken["G2"] and made["helpers_lost"] > 0),
        ),
        (
            "G4",
            f"{sum(each['count'] for each in submits.values())} submits, Redis broken in {len(submits)} ways",
            f"all accepted; slowest p99 {p99} s ({slowest.rpartition(': ')[2]})",
            _yes(p99 <= SUBMIT_BOUND_SECONDS),
        ),
        (
            "G5",
            f"Redis {on('redis')}",
            f"at most {made['most_copies_of_a_message']} copies sent",
            _yes(not broken["G1"]),
        ),
        ("G6", f"PostgreSQL {on('sql')}", f"{broken['G6']} false; {_listed(made['answers'])}", _yes(not broken["G6"])),
        ("G7", "requests repeated with their key", f"{broken['G7']} doubled", _yes(not broken["G7"])),
        (
            "G8",
            f"{made['poisonous']} jobs that kill their process",
            f"each given up after 3; {broken['G8']} others harmed",
            _yes(not broken["G8"]),
        ),
        ("G9", f"{made['deploys']} restarts by SIGTERM", f"{broken['G9']} forced", _yes(not broken["G9"])),
        (
            "G11",
            f"{sum(made['events'].values())} events, {made['webhook_calls_refused']} calls failed",
            f"{_listed(made['events'])}; {broken['G11']} unaccounted for",
            _yes(not broken["G11"]),
        ),
        ("G17", f"S3 {on('s3')}", "jobs waited and finished", _yes(not broken["G1"])),
    ]


def judge_recovery(made: dict[str, Any]) -> list[Row]:
    took = made["recovery_seconds"]
    return [
        (
            "G3",
            f"{took['count']} kills in mid-job, default settings",
            f"next attempt after p50 {took['p50']} s, p99 {took['p99']} s, at most {took['max']} s",
            _yes(took["p99"] < RECOVERY_BOUND_SECONDS and not made["violations"]),
        )
    ]


VERDICTS: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "controls": judge_controls,
    "storm": judge_storm,
    "recovery": judge_recovery,
}


def _yes(kept: bool) -> str:
    return "yes" if kept else "NO"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _markdown(rows: Sequence[Row]) -> str:
    lines = ["| promise | what was done | what happened | kept |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _commit() -> str:
    ran = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False)
    return (ran.stdout.strip() or "unknown") + (" with changes" if changed.stdout.strip() else "")


def _machine() -> str:
    return f"{os.cpu_count()} cores, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
