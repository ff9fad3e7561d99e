"""The live view of a run: a panel that is redrawn on a terminal, a plain line now and then elsewhere.

It is fed the records that the coordinator writes, one a step, and computes nothing of its own: the figures over the
last seconds come from `coordinator.records.rates`. Waiting for the run and reading its file is the business
of `node.commands.run`; the picture of a finished run is `node.watch.report`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coordinator.records import rates
from coordinator.records.rates import Record, number
from netem.profile import Profile, resolve_schedule
from netem.schedule import Schedule
from netem.units import format_size
from node.config import Config
from node.train.schedule import StepSchedule

PLAIN_INTERVAL_S = 5.0
REDRAW_INTERVAL_S = 0.25
LEAST_BAR = 12
"""Columns of the progress bar with its gaps, at the least; with less room it has a line of its own."""

PROCESS_FIGURES = ("sent", "now", "payload/step", "exposed/step", "CPU", "memory", "peak")


class View:
    """Shows one run while it is entered. `clock` is in seconds and never goes back.

    With `say`, plain lines are handed to it in place of the console. `gone_s` is how long the run has gone on already.
    """

    def __init__(
        self,
        config: Config,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], object] | None = None,
        gone_s: float = 0.0,
    ) -> None:
        self._config = config
        self._schedule = StepSchedule(config.model, config.compress, config.train)
        self._title, self._subtitle = title(config), subtitle(config)
        self._console = console or Console()
        self._clock = clock
        self._began_s = clock() - gone_s
        self._shown_s = -float("inf")
        self._news = False
        self._window: deque[Record] = deque()
        self._sent_bytes: dict[str, float] = {}
        self._heldout: tuple[int, float] | None = None
        self._changed = ""
        self._fault = ""
        self._skipped = 0
        self._state = ""
        self._say = say or self._print
        live = say is None and self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, auto_refresh=False, transient=False) if live else None

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
            self._draw()
        else:
            self._say(f"{self._title}: {self._subtitle}")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._draw()
            self._live.stop()
        elif self._news:
            self._print_line()

    def feed(self, record: dict[str, Any]) -> None:
        """Take in one record, and show it if it is time to."""
        self._news = True
        self._window.append(record)
        rates.drop_old(self._window)
        for name, values in rates.nodes_of(record).items():
            self._sent_bytes[name] = self._sent_bytes.get(name, 0.0) + number(values, "sent_wire_bytes")
        if isinstance(record.get("heldout_loss"), int | float):
            self._heldout = int(number(record, "step")), number(record, "heldout_loss")
        self._skipped += rates.skipped_steps([record])
        if changes := rates.network_changes([record]):
            self._changed = f"{changes[-1].text} (step {changes[-1].step})"
        if faults := rates.faults([record]):
            self._fault = f"{faults[-1].text} (after step {faults[-1].step})"
        self.tick()

    def tell(self, state: str) -> None:
        """Say in words where the run is; it is shown until the first record comes."""
        news, self._state = state != self._state, state
        if news and not self._live and not self._window:
            self._say(state)

    def tick(self) -> None:
        """Show what is known by now; to be called several times a second."""
        interval_s = REDRAW_INTERVAL_S if self._live else PLAIN_INTERVAL_S
        if self._clock() - self._shown_s < interval_s:
            return
        if self._live:
            self._draw()
        elif self._news:
            self._print_line()

    def render(self) -> RenderableType:
        """The panel."""
        body = [*self._progress(), *self._figures(), *self._processes()] if self._window else [self._waiting()]
        body += [Text(f"network: {self._changed}", style="yellow")] if self._changed else []
        body += [Text(f"nodes: {self._fault}", style="yellow")] if self._fault else []
        # A border's text is cut where it is too long; inside the panel it is wrapped.
        fits = max(cell_len(self._title), cell_len(self._subtitle)) <= self._width
        body = body if fits else [Text(self._title, style="bold"), Text(self._subtitle, style="dim"), *body]
        spaced = [part for entry in body for part in (entry, Text())][:-1]
        return Panel(
            Group(*spaced),
            title=Text(self._title, style="bold") if fits else None,
            subtitle=Text(self._subtitle, style="dim") if fits else None,
            title_align="left",
            subtitle_align="left",
            padding=(1, 2),
        )

    def line(self) -> str:
        """The same in one line; something has been fed."""
        records, steps = list(self._window), self._config.train.steps
        step = int(number(records[-1], "step"))
        now = self._schedule.phase(step)
        parts = [f"step {step}/{steps}", *([now] if now else []), f"loss {_loss(records[-1].get('loss'))}"]
        if self._heldout:
            parts.append(f"held-out {self._heldout[1]:.3f} (step {self._heldout[0]})")
        parts += [f"{label} {value}" for label, value in self._window_figures()]
        parts += [f"network: {self._changed}"] if self._changed else []
        parts += [f"nodes: {self._fault}"] if self._fault else []
        return "  ".join([*parts, f"ETA {format_duration(rates.eta_s(records, steps))}"])

    def _draw(self) -> None:
        assert self._live is not None
        self._live.update(self.render(), refresh=True)
        self._shown_s = self._clock()

    def _print_line(self) -> None:
        self._say(self.line())
        self._shown_s, self._news = self._clock(), False

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _waiting(self) -> RenderableType:
        waited = format_duration(self._clock() - self._began_s)
        nodes = _count(self._config.coordinator.nodes, "node")
        return Text(f"{self._state or f'{nodes} starting, joining, and computing the first step'} … {waited}")

    @property
    def _width(self) -> int:
        """Columns between the panel's borders and their padding."""
        return self._console.width - 6

    def _progress(self) -> list[RenderableType]:
        records, steps = list(self._window), self._config.train.steps
        step = int(number(records[-1], "step"))
        now = self._schedule.phase(step)
        elapsed = format_duration(self._clock() - self._began_s)
        done = Text.assemble((f"step {step}", "bold"), f" of {steps}", (f"  {now}" if now else "", "yellow"))
        left = Text.assemble(f"{elapsed} gone, ", (f"{format_duration(rates.eta_s(records, steps))} to go", "bold"))
        bar = ProgressBar(total=steps, completed=step)
        if done.cell_len + left.cell_len + LEAST_BAR > self._width:
            return [Group(done, left, bar)]
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(justify="right", no_wrap=True)
        grid.add_row(done, bar, left)
        return [grid]

    def _figures(self) -> list[RenderableType]:
        figures = [("loss", _loss(self._window[-1].get("loss")))]
        if self._heldout:
            figures.append((f"held-out, {self._heldout[0]}", f"{self._heldout[1]:.3f}"))
        figures += self._window_figures()
        grids: list[RenderableType] = []
        for row in _rows([max(cell_len(label), cell_len(value)) + 3 for label, value in figures], self._width + 3):
            grid = Table.grid(padding=(0, 3))
            grid.add_row(*[Text(figures[place][0], style="dim") for place in row])
            grid.add_row(*[Text(figures[place][1], style="bold") for place in row])
            grids.append(grid)
        return grids

    def _window_figures(self) -> list[tuple[str, str]]:
        records = list(self._window)
        saved = rates.compression(records)
        tokens_per_s, dilation = rates.tokens_per_s(records), self._config.net.dilation
        figures = [("tokens/s", _amount(tokens_per_s))]
        if dilation != 1:
            figures.append(("emulated tokens/s", _amount(tokens_per_s and tokens_per_s * dilation)))
        figures += [
            ("exposed", _percent(rates.time_share(records, "exposed_s"))),
            ("averaging", _percent(rates.time_share(records, "averaging_s"))),
            ("barrier", _percent(rates.time_share(records, "barrier_s"))),
        ]
        if "mfu" in records[-1]:
            figures.append(("MFU", _percent(math.fsum(number(record, "mfu") for record in records) / len(records))))
        if saved is not None and saved.compressed_layers is not None:
            figures.append(("compression", _percent(saved.compressed_layers)))
            figures.append(("over all layers", _percent(saved.all_layers)))
        if self._skipped:
            figures.append(("steps skipped", str(self._skipped)))
        if missed := rates.missed_links(records):
            figures.append(("untrusted, network late by", _percent(missed[0].share)))
        return figures

    def _processes(self) -> list[RenderableType]:
        """One line a node; on a narrow terminal the columns follow each other in several tables."""
        records = list(self._window)
        names = rates.node_names(records)
        columns = [(label, [self._process_figure(records, name, label) for name in names]) for label in PROCESS_FIGURES]
        first = max(map(cell_len, ("process", *names))) + 2
        widths = [max(map(cell_len, (label, *values))) + 2 for label, values in columns]
        tables: list[RenderableType] = []
        for row in _rows(widths, self._width + 2 - first):
            table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
            table.add_column("process", no_wrap=True)
            for place in row:
                table.add_column(columns[place][0], justify="right", no_wrap=True)
            for index, name in enumerate(names):
                gone = name not in rates.nodes_of(records[-1])
                table.add_row(name, *[columns[place][1][index] for place in row], style="dim" if gone else None)
            tables.append(table)
        return tables

    def _process_figure(self, records: list[Record], name: str, label: str) -> str:
        values = rates.nodes_of(records[-1]).get(name)
        if values is None:
            return "–"
        match label:
            case "sent":
                return format_size(self._sent_bytes.get(name, 0.0))
            case "now":
                bps = rates.sent_bps(records, name)
                return "–" if bps is None else f"{bps / 1e6:.1f} Mbit/s"
            case "payload/step":
                return format_size(sum(rates.total(records, key, name) for key in rates.PAYLOADS) / len(records))
            case "exposed/step":
                return f"{rates.total(records, 'exposed_s', name) / len(records):.2f} s"
            case "CPU":
                return f"{number(values, 'cpu_percent'):.0f} %" if "cpu_percent" in values else "–"
        key = "rss_bytes" if label == "memory" else "memory_peak_bytes"
        return f"{number(values, key) / 1e6:.0f} MB" if key in values else "–"


def _rows(widths: Sequence[int], room: int) -> list[range]:
    """Places of things of these widths, side by side as long as they fit, in as many rows as it takes."""
    rows: list[range] = []
    used = room
    for place, width in enumerate(widths):
        if used + width > room:
            rows.append(range(place, place))
            used = 0
        rows[-1] = range(rows[-1].start, place + 1)
        used += width
    return rows


def title(config: Config) -> str:
    """What is run: "demo · 4 layers × 128, context 1024 in 4 chunks · 4 nodes"."""
    model, nodes = config.model, config.coordinator.nodes
    shape = f"{_count(model.layers, 'layer')} × {model.d_model}, context {model.context} in {model.chunks} chunks"
    return f"{config.run.name} · {shape} · {_count(nodes, 'node')}"


def subtitle(config: Config) -> str:
    """How: what is sent, and over which network."""
    compress = config.compress
    mode = {
        "subspace": f"subspace, K −{compress.k_share:.0%} V −{compress.v_share:.0%}",
        "dense": "dense, K and V as they are",
        "local": "local, no remote attention",
    }[compress.mode]
    if compress.remote_last_layers and compress.mode != "local":
        far = compress.remote_last_layers
        mode += ", only the last layer sees far" if far == 1 else f", only the last {far} layers see far"
    return f"{mode} · {describe_network(resolve_schedule(config.net))}"


def describe_profile(profile: Profile) -> str:
    """A network in words, with the word "emulated" where this host shapes it."""
    return f"emulated {profile}" if profile.shaped else str(profile)


def describe_network(schedule: Schedule) -> str:
    """The same over time."""
    emulated = schedule.profile.shaped or schedule.timed or schedule.traced
    return f"emulated {schedule}" if emulated else describe_profile(schedule.profile)


def format_duration(seconds: float | None) -> str:
    """ "1:02:03", "2:03"; a dash where it is not known."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _loss(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %" if share > 0.9 else f"{100 * share:.0f} %"


def _amount(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
