"""Judges, prints and draws the results of run.py. Needs no GPU, no torch.

The floor of a row is the larger of its bytes over the copy bandwidth and its operations
over the rate of a matrix product, both measured in the same run; "of ceiling" is that
floor over the time.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Row = dict[str, Any]


class Metric(NamedTuple):
    """How a target's value follows from a row, and whether more of it is better.

    value: (row, row or peer compared with, ceilings) -> number.
    """

    value: Callable[[Row, Row, dict], float]
    more_is_better: bool
    form: str


METRICS = {
    "us": Metric(lambda row, _, __: row["us"], False, "{:.2f} us"),
    "value": Metric(lambda row, _, __: row["value"], False, "{:g}"),
    "TFLOP/s": Metric(lambda row, _, __: tflops(row), True, "{:.0f} TFLOP/s"),
    "TB/s": Metric(lambda row, _, __: terabytes(row), True, "{:.2f} TB/s"),
    "of copy": Metric(
        lambda row, _, top: terabytes(row) * 1e12 / top["bytes/s"],
        True,
        "{:.2f} of copy",
    ),
    "relative time": Metric(
        lambda row, other, _: row["us"] / other["us"], False, "{:.2f}x the time"
    ),
    "relative rate": Metric(
        lambda row, other, _: tflops(row) / tflops(other), True, "{:.2f}x the rate"
    ),
    "speedup": Metric(
        lambda row, other, _: other["us"] / row["us"], True, "{:.2f}x as fast"
    ),
}


def tflops(row: Row) -> float:
    return row["flops"] / row["us"] * 1e-6


def terabytes(row: Row) -> float:
    return row["bytes"] / row["us"] * 1e-6


def floor_us(row: Row, ceilings: dict) -> float:
    return 1e6 * max(
        row["bytes"] / ceilings["bytes/s"], row["flops"] / ceilings["flop/s"]
    )


class Verdict(NamedTuple):
    """A row's value of its target's metric, and "aim", "least" or "missed"."""

    value: float
    text: str
    met: str


def judge(row: Row, rows: dict[str, Row], ceilings: dict) -> Verdict | None:
    """Holds a row against its target; None where it has none or was not measured."""
    target = row.get("target")
    if not target or "failed" in row or ("us" not in row and "value" not in row):
        return None
    against = target["against"]
    other = row.get("peers", {}).get(against, rows.get(against, {}))
    if against and "us" not in other:
        return None
    metric = METRICS[target["metric"]]
    value = metric.value(row, other, ceilings)
    reached = [
        name
        for name in ("aim", "least")
        if (value >= target[name] if metric.more_is_better else value <= target[name])
    ]
    return Verdict(
        value, metric.form.format(value), reached[0] if reached else "missed"
    )


def merge_inductor(results: dict) -> None:
    """Moves the rows of the part `inductor` to the peers of the rows alone."""
    rows = results["parts"].get("alone", {}).get("rows", {})
    for name, row in results["parts"].get("inductor", {}).get("rows", {}).items():
        if "us" in rows.get(name, {}):
            rows[name]["peers"] |= row.get("peers", {"inductor": row})
    if "inductor" in results["parts"]:
        results["parts"]["inductor"]["rows"] = {}


class Line(NamedTuple):
    """One line of the table, as text."""

    name: str
    where: str
    time: str
    rate: str
    of_ceiling: str
    peers: str
    value: str
    target: str
    met: str


def lines(results: dict) -> Iterator[Line]:
    """All rows of all parts, failed ones too."""
    parts = results["parts"]
    ceilings = parts.get("alone", {}).get("ceilings")
    for where, part in parts.items():
        rows = part["rows"]
        for name, row in rows.items():
            if "failed" in row:
                yield Line(name, where, "FAILED", "", "", row["failed"], "", "", "")
                continue
            time = rate = of_ceiling = ""
            if "value" in row:
                time = f"{row['value']:.3g} {row['unit']}"
            if "us" in row:
                time = f"{row['us']:.2f} us [{row['us_p20']:.2f}, {row['us_p80']:.2f}]"
            if "bytes" in row and ceilings:
                compute = row["flops"] / ceilings["flop/s"]
                bound = compute > row["bytes"] / ceilings["bytes/s"]
                rate = f"{terabytes(row):.3g} TB/s"
                if bound:
                    rate = f"{tflops(row):.3g} TFLOP/s"
                of_ceiling = f"{100 * floor_us(row, ceilings) / row['us']:.0f}%"
            verdict = judge(row, rows, ceilings or {})
            target = row.get("target")
            bounds = f"{target['least']:g} / {target['aim']:g}" if target else ""
            yield Line(
                name, where, time, rate, of_ceiling, ", ".join(_peers(row)),
                verdict.text if verdict else "", bounds, verdict.met if verdict else "",
            )  # fmt: skip


def _peers(row: Row) -> Iterator[str]:
    if "lazy" in row:
        yield f"lazily {row['lazy']['us']:.2f} us"
    for name, peer in row.get("peers", {}).items():
        if "us" in peer:
            yield f"{name} {peer['us']:.2f} us"
        else:
            yield f"{name} {'absent' if 'absent' in peer else 'failed'}"


def left_out(results: dict) -> list[str]:
    return [
        f"{where}: {name}"
        for where, part in results["parts"].items()
        for name in part["left out"]
    ]


def failed(results: dict) -> list[str]:
    """The rows of ours that failed, and the parts that did not come to their end."""
    found = [
        f"{line.where}: {line.name}" for line in lines(results) if line.time == "FAILED"
    ]
    return found + [
        f"{where}: {part['ended']}"
        for where, part in results["parts"].items()
        if part.get("ended")
    ]


def text(results: dict) -> str:
    """The table for a terminal."""
    out = []
    device = results["device"]
    ceilings = results["parts"].get("alone", {}).get("ceilings")
    out.append(f"device: {', '.join(str(v) for v in device.values())}")
    if ceilings:
        out.append(
            f"ceilings of this run: copy {ceilings['bytes/s'] / 1e12:.3g} TB/s, bf16"
            f" product {ceilings['flop/s'] / 1e12:.3g} TFLOP/s"
        )
    for line in lines(results):
        out.append(
            f"{line.where:8} {line.name:40} {line.time:34} {line.rate:13}"
            f"{line.of_ceiling:>5}  {line.value:17} ({line.target:11}) {line.met:7}"
            f" {line.peers}"
        )
    met = [line.met for line in lines(results) if line.met]
    out.append(
        f"targets: {met.count('aim')} reached the aim, {met.count('least')} the least,"
        f" {met.count('missed')} missed"
    )
    for name in left_out(results):
        out.append(f"left out, for want of time: {name}")
    return "\n".join(out)


def markdown(results: dict) -> str:
    """The table for a document."""
    heads = ("row", "where", "time [p20, p80]", "rate", "of ceiling", "value", "least / aim",
             "met", "beside it")  # fmt: skip
    out = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for line in lines(results):
        cells = (line.name, line.where, line.time, line.rate, line.of_ceiling, line.value,
                 line.target, line.met, line.peers)  # fmt: skip
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def plot(results: dict, folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """Draws roofline and bars; needs matplotlib.

    Returns: the SVG files, FOLDER/STEM_roofline.svg and FOLDER/STEM_peers.svg; none
    where no row was measured alone.
    """
    part = results["parts"].get("alone", {})
    rows = {name: row for name, row in part.get("rows", {}).items() if "us" in row}
    if not rows or "ceilings" not in part:
        return []
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "xla_ops"  # the same file for the same data
    title = results["device"]["name"]
    paths = []
    for name, draw in (("roofline", _draw_roofline), ("peers", _draw_peers)):
        figure = draw(rows, part["ceilings"], title)
        paths.append(folder / f"{stem}_{name}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def _draw_roofline(rows: dict[str, Row], ceilings: dict, title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ridge = ceilings["flop/s"] / ceilings["bytes/s"]
    reach = [ridge / 1e3, ridge, ridge * 1e2]
    axes.plot(
        reach,
        [min(x * ceilings["bytes/s"], ceilings["flop/s"]) * 1e-12 for x in reach],
        color="black",
        label="copy bandwidth, bf16 product",
    )
    groups: dict[str, list[Row]] = {}
    for name, row in rows.items():
        if row["flops"]:
            groups.setdefault(name.split()[0], []).append(row)
    for name, members in groups.items():
        axes.scatter(
            [row["flops"] / row["bytes"] for row in members],
            [tflops(row) for row in members],
            label=name,
            s=18,
        )
    axes.set(
        xscale="log", yscale="log", title=title, xlabel="FLOP a byte of device memory",
        ylabel="TFLOP/s",
    )  # fmt: skip
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    return figure


# Group -> unit of its bars, and a row's or peer's length in it.
_BARS: dict[str, tuple[str, Callable[[Row, float], float]]] = {
    "prefill": ("TFLOP/s", lambda row, us: row["flops"] / us * 1e-6),
    "decode": ("TB/s", lambda row, us: row["bytes"] / us * 1e-6),
    "elementwise": ("TB/s", lambda row, us: row["bytes"] / us * 1e-6),
    "small": ("us (less is better)", lambda row, us: us),
    "cache": ("us (less is better)", lambda row, us: us),
}


def _draw_peers(rows: dict[str, Row], ceilings: dict, title: str):
    from matplotlib.figure import Figure

    groups = {
        group: [(name, row) for name, row in rows.items() if row["group"] == group]
        for group in _BARS
    }
    groups = {group: members for group, members in groups.items() if members}
    names = ["xla_ops"]
    for row in rows.values():
        for peer, found in row["peers"].items():
            if "us" in found and peer not in names:
                names.append(peer)
    counts = [
        sum(1 + sum("us" in p for p in row["peers"].values()) for _, row in members)
        + len(members)
        for members in groups.values()
    ]
    figure = Figure(figsize=(9, 1 + 0.16 * sum(counts)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(groups), 1, squeeze=False, height_ratios=counts)
    for axes, (group, members) in zip(grid[:, 0], groups.items(), strict=True):
        unit, length = _BARS[group]
        at, labels, ticks = 0, [], []
        for name, row in members:
            timed = {"xla_ops": row} | row["peers"]
            first = at
            for peer, found in timed.items():
                if "us" in found:
                    color = f"C{names.index(peer)}"
                    axes.barh(at, length(row, found["us"]), color=color)
                    at += 1
            ticks.append((first + at - 1) / 2)
            labels.append(name)
            at += 1
        if unit == "TB/s":
            axes.axvline(ceilings["bytes/s"] * 1e-12, color="black", linestyle=":")
        if unit == "TFLOP/s":
            axes.axvline(ceilings["flop/s"] * 1e-12, color="black", linestyle=":")
        axes.set_yticks(ticks, labels, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(f"{group}: {unit}")
    handles = [
        figure.axes[0].barh(0, 0, color=f"C{i}", label=name)
        for i, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=4, fontsize=7)
    return figure
