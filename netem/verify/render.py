"""A certificate as a table for a terminal, as Markdown, and as one JSON object."""

from __future__ import annotations

import msgspec

from netem.tables import markdown_table
from netem.units import format_rate, format_size, format_time
from netem.verify.promise import Certificate, Host, Row, round_rate

_HEAD = ("profile", "bytes", "flows", "cores", "kept by", "rate", "measured", "promised", "took", "error", "")


def as_json(certificate: Certificate) -> str:
    """The certificate as one JSON object on one line."""
    return msgspec.json.encode(certificate).decode()


def as_text(certificate: Certificate) -> str:
    """A table with aligned columns, then the verdict."""
    lines = [_HEAD, *(_cells(row) for row in certificate.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([_host(certificate.host), "", *table, "", *_conclusion(certificate)])


def as_markdown(certificate: Certificate, title: str, command: str) -> str:
    """A whole Markdown document, with the command that made it."""
    head = [f"# {title}", "", f"`{command}`", "", f"{_host(certificate.host)}.", ""]
    table = markdown_table(_HEAD, (_cells(row) for row in certificate.rows))
    return "\n".join([*head, table, "", "  \n".join(_conclusion(certificate)), "", _NOTE, ""])


_NOTE = """\
All figures are medians. The promised time is latency + (bits on the wire, headers included - burst) / rate. The error
is promised over measured time - 1, and negative if the transfer took longer; the measured rate is the promised one with
that error. Errors in brackets are not judged: 1.5 % of the promised time is less than this host's own delay for one
message, which may explain the error. Rows kept by tbf are plain TCP through two network namespaces under the kernel's
token bucket, without latency and without Isthmus."""


def _cells(row: Row) -> tuple[str, ...]:
    error = "–" if row.error is None else f"{row.error:+.2%}"
    return (
        f"{row.profile}, {row.case}" if row.case else row.profile,
        format_size(row.bytes),
        str(row.flows),
        "busy" if row.busy else "idle",
        row.reference,
        "–" if row.rate_bps is None else format_rate(row.rate_bps),
        format_rate(float(f"{row.measured_bps:.4g}")),
        format_time(float(f"{row.promised_s:.4g}")),
        format_time(float(f"{row.measured_s:.4g}")),
        error if row.judged or row.error is None else f"({error})",
        "missed" if row.missed else "",
    )


def _host(host: Host) -> str:
    return (
        f"This host carries {format_rate(round_rate(host.loopback_bps))} between two processes unshaped, "
        f"{format_rate(round_rate(host.shaped_bps))} through a shaper that never waits; "
        f"a message of 64 KiB takes at most {format_time(float(f'{host.delay_s:.2g}'))}, and "
        f"{format_time(float(f'{host.busy_delay_s:.2g}'))} while its {host.cores} cores are busy"
    )


def _conclusion(certificate: Certificate) -> list[str]:
    skipped = [f"left out: {certificate.skipped}"] if certificate.skipped else []
    return [*skipped, f"verdict: {certificate.verdict}: {certificate.reason}"]
