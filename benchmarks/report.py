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

    where: str
    name: str
    time: str
    spread: str = ""  # half of p80 - p20, of the median
    rate: str = ""
    of_ceiling: str = ""
    value: str = ""
    target: str = ""  # least / aim
    met: str = ""
    peers: str = ""  # their times over ours


def lines(results: dict) -> Iterator[Line]:
    """All rows of all parts, failed ones too."""
    parts = results["parts"]
    ceilings = parts.get("alone", {}).get("ceilings")
    for where, part in parts.items():
        for name, row in part["rows"].items():
            if "failed" in row:
                yield Line(where, name, "FAILED", peers=row["failed"])
                continue
            cells = (
                {"time": f"{row['value']:.3g} {row['unit']}"} if "value" in row else {}
            )
            if "us" in row:
                half = (row["us_p80"] - row["us_p20"]) / 2
                cells["time"] = f"{row['us']:.2f} us"
                cells["spread"] = f"{100 * half / row['us']:.1f}%"
            if "bytes" in row and ceilings:
                share = floor_us(row, ceilings) / row["us"]
                cells["rate"] = _rate(row, ceilings)
                cells["of_ceiling"] = f"{100 * share:.0f}%"
            verdict = judge(row, part["rows"], ceilings or {})
            if verdict is not None:
                least, aim = (row["target"][k] for k in ("least", "aim"))
                cells["value"], cells["met"] = verdict.text, verdict.met
                cells["target"] = f"{least:.3g} / {aim:.3g}"
            yield Line(where, name, **cells, peers=", ".join(_ratios(row)))


def _rate(row: Row, ceilings: dict) -> str:
    """Of operations or of bytes, whichever limits more."""
    if row["flops"] / ceilings["flop/s"] > row["bytes"] / ceilings["bytes/s"]:
        return f"{tflops(row):.3g} TFLOP/s"
    return f"{terabytes(row):.3g} TB/s"


def _ratios(row: Row) -> Iterator[str]:
    others = {"lazily": row["lazy"]} if "lazy" in row else {}
    if "copy" in row:
        others["a copy as large"] = row["copy"]
    for name, other in (others | row.get("peers", {})).items():
        if "us" in other:
            yield f"{name} {other['us'] / row['us']:.2f}x"


def unmeasured_peers(results: dict) -> list[str]:
    """The peers that are not installed, or could not compute a row, and why."""
    found: dict[str, None] = {}
    for part in results["parts"].values():
        for name, row in part["rows"].items():
            for peer, entry in row.get("peers", {}).items():
                if "absent" in entry:
                    found[f"{peer} is absent: {entry['absent']}"] = None
                elif "failed" in entry:
                    found[f"{peer} failed on {name}: {entry['failed']}"] = None
    return list(found)


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
        bounds = f"({line.target})" if line.target else ""
        out.append(
            f"{line.where:6} {line.name:38} {line.time:>11} {line.spread:>5}"
            f" {line.rate:>12} {line.of_ceiling:>4} | {line.value:14} {bounds:11}"
            f" {line.met:6} | {line.peers}".rstrip(" |")
        )
    met = [line.met for line in lines(results) if line.met]
    out.append(
        f"targets: {met.count('aim')} reached the aim, {met.count('least')} the least,"
        f" {met.count('missed')} missed"
    )
    out += unmeasured_peers(results)
    out += [f"left out, for want of time: {name}" for name in left_out(results)]
    return "\n".join(out)


def markdown(results: dict) -> str:
    """The table for a document."""
    heads = {
        "name": "row",
        "where": "where",
        "time": "time",
        "spread": "spread",
        "rate": "rate",
        "of_ceiling": "of ceiling",
        "value": "against the target",
        "target": "least / aim",
        "met": "met",
        "peers": "others' time over ours",
    }
    out = [f"| {' | '.join(heads.values())} |", "|" + "---|" * len(heads)]
    out += [
        f"| {' | '.join(getattr(line, cell) for cell in heads)} |"
        for line in lines(results)
    ]
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
    for row in rows.values():
        if row["flops"]:
            groups.setdefault(row["op"], []).append(row)
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
    "cache": ("TB/s", lambda row, us: row["bytes"] / us * 1e-6),
}


# The groups of each column of the figure.
_COLUMNS = (("prefill", "decode"), ("elementwise", "small", "cache"))


def _draw_peers(rows: dict[str, Row], ceilings: dict, title: str):
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = ["xla_ops"]
    for row in rows.values():
        for peer, found in row["peers"].items():
            if "us" in found and peer not in names:
                names.append(peer)
    columns = [
        {
            group: [(name, row) for name, row in rows.items() if row["group"] == group]
            for group in groups
        }
        for groups in _COLUMNS
    ]
    columns = [{g: m for g, m in column.items() if m} for column in columns]
    columns = [column for column in columns if column]
    tallest = max(sum(map(_height, c.values())) for c in columns)
    figure = Figure(
        figsize=(6 * len(columns), 1.2 + 0.1 * tallest), layout="constrained"
    )
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, column in zip(parts, columns, strict=True):
        heights = [_height(members) for members in column.values()]
        grid = part.subplots(len(column), 1, squeeze=False, height_ratios=heights)
        for axes, (group, members) in zip(grid[:, 0], column.items(), strict=True):
            _draw_group(axes, group, members, names, ceilings)
    handles = [Patch(color=f"C{i}", label=name) for i, name in enumerate(names)]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(names), fontsize=7
    )
    figure.suptitle(title, fontsize=10)
    return figure


def _height(members: list[tuple[str, Row]]) -> int:
    """How many bars and gaps a group's rows take, and its axis."""
    return 6 + sum(
        2 + sum("us" in peer for peer in row["peers"].values()) for _, row in members
    )


def _draw_group(axes, group, members, names, ceilings) -> None:
    unit, length = _BARS[group]
    at, labels, ticks = 0, [], []
    for name, row in members:
        timed = {
            peer: found["us"]
            for peer, found in ({"xla_ops": row} | row["peers"]).items()
            if "us" in found
        }
        for i, (peer, us) in enumerate(timed.items()):
            axes.barh(at + i, length(row, us), color=f"C{names.index(peer)}")
        ticks.append(at + (len(timed) - 1) / 2)
        labels.append(name)
        at += len(timed) + 1
    top = {"TB/s": "bytes/s", "TFLOP/s": "flop/s"}.get(unit)
    if top:
        axes.axvline(ceilings[top] * 1e-12, color="black", linestyle=":")
    axes.set_yticks(ticks, labels, fontsize=6)
    axes.set_ylim(at - 0.5, -1)
    axes.tick_params(axis="x", labelsize=6)
    axes.set_xlabel(f"{group}: {unit}", fontsize=7)
