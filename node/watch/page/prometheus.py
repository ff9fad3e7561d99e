"""The present figures of a run in Prometheus' text format, for `/metrics`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from node.watch.page.state import Json, PageState


def exposition(state: PageState) -> bytes:
    """All gauges of a run."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Run(state))
    return generate_latest(registry)


class _Run(Collector):
    def __init__(self, state: PageState) -> None:
        self._state = state

    def collect(self) -> Iterable[GaugeMetricFamily]:
        found = self._state.news(self._state.step)  # the present figures, without the charts
        yield from _header(found["header"])
        yield from _nodes(found["nodes"])
        yield from _links(found["links"])


def _header(header: Json) -> Iterator[GaugeMetricFamily]:
    shown = {
        "step": ("isthmus_step", "Optimizer steps done"),
        "steps": ("isthmus_steps", "Optimizer steps of the whole run"),
        "generation": ("isthmus_generation", "Version number of the membership"),
        "loss": ("isthmus_loss", "Training loss of the last step, in nats a token"),
        "heldout_loss": ("isthmus_heldout_loss", "Held-out loss of the last evaluation, in nats a token"),
        "tokens_per_s": ("isthmus_tokens_per_second", "Tokens of all nodes a second of wall time"),
        "saved": ("isthmus_payload_saved_ratio", "Share of the exchange's bytes that was not sent"),
        "faults": ("isthmus_faults", "Nodes lost, made to go, or slow, and rounds whose results differed"),
        "refused_connections": ("isthmus_refused_connections", "Connections of strangers closed at a door"),
        "refused_requests": ("isthmus_refused_requests", "Requests that the coordinator refused to strangers"),
        "skipped": ("isthmus_steps_skipped", "Steps that were not finite and were not taken"),
    }
    for key, (name, text) in shown.items():
        if header[key] is not None:
            yield GaugeMetricFamily(name, text, value=float(header[key]))
    trusted = 0.0 if header["untrusted"] else 1.0
    yield GaugeMetricFamily("isthmus_network_trusted", "1 where this host keeps the emulated rates", value=trusted)


def _nodes(nodes: list[Json]) -> Iterator[GaugeMetricFamily]:
    up = GaugeMetricFamily("isthmus_node_up", "1 where the node reported the last step", labels=["node"])
    parts = GaugeMetricFamily("isthmus_step_seconds", "Mean time of a step's parts lately", labels=["node", "part"])
    sent = GaugeMetricFamily("isthmus_node_sent_bits_per_second", "Bits sent, with framing", labels=["node"])
    memory = GaugeMetricFamily("isthmus_node_memory_bytes", "Memory of the node's process", labels=["node"])
    for node in nodes:
        up.add_metric([node["name"]], float(node["there"]))
        for part, seconds in node["parts_s"].items():
            parts.add_metric([node["name"], part], seconds)
        if node["sent_bps"] is not None:
            sent.add_metric([node["name"]], node["sent_bps"])
        if node["rss_bytes"] is not None:
            memory.add_metric([node["name"]], node["rss_bytes"])
    yield from (up, parts, sent, memory)


def _links(links: list[Json]) -> Iterator[GaugeMetricFamily]:
    ends = ["source", "target"]
    busy = GaugeMetricFamily("isthmus_link_busy_ratio", "Share of the time that the link carries data", labels=ends)
    late = GaugeMetricFamily("isthmus_link_late_ratio", "Share of the link's time that is this host's", labels=ends)
    for link in links:
        busy.add_metric([link["source"], link["target"]], link["busy"])
        late.add_metric([link["source"], link["target"]], link["late"])
    yield from (busy, late)
