"""The section [coordinator]: its address, the number of nodes, and the time limits.

Only settings and their checks are here; `run` and `member` act on them. Secrets must be left out of a saved
configuration (`SECRETS` names such keys).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

import msgspec

from coordinator.assignment import Mode
from coordinator.layout import Layout
from netem.config import Section
from netem.errors import ConfigError

SECRETS = ("coordinator.token", "coordinator.operator")

LONGEST_S = 31_536_000.0
"""The longest deadline that can be set: a year."""

_Count = Annotated[int, msgspec.Meta(ge=1)]
_ADDRESS = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.%]+\]|[^:/\[\]]+):(?P<port>\d{1,5})")


class CoordinatorConfig(Section, frozen=True, kw_only=True):
    """Rendezvous, ownership of chunks, and deadlines. All times are seconds of the wall clock."""

    address: Annotated[
        str,
        msgspec.Meta(description="Where the coordinator listens, tcp://INTERFACE:PORT; port 0 takes a free one."),
    ] = "tcp://127.0.0.1:0"
    nodes: Annotated[int, msgspec.Meta(ge=1, le=1000, description="Number of nodes.")] = 1
    stages: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=1000,
            description="Pipeline stages of each node, where a node is a site of several processes that torchrun "
            "starts. isthmus plan knows them; a run takes 1.",
        ),
    ] = 1
    shards: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=1000,
            description="Processes over which each node shards its weights (FSDP2), where a node is a site that "
            "torchrun starts. Each of them computes its part of a step's contexts.",
        ),
    ] = 1
    min_nodes: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=1000,
            description="Fewest nodes that train. Where losses leave fewer, the run waits coordinator.join_timeout_s "
            "for nodes to come back, and then ends.",
        ),
    ] = 1
    max_retries_per_step: Annotated[
        int,
        msgspec.Meta(
            ge=0,
            le=1000,
            description="How often one step may be begun anew, because nodes were lost or disagreed, before the run "
            "ends.",
        ),
    ] = 5
    token: Annotated[
        str,
        msgspec.Meta(
            max_length=512,
            description="The run's secret, which proves membership and never crosses the network; it may be empty only "
            "if the address is this machine's own (loopback), or if there are keys. Best given as ISTHMUS_TOKEN.",
        ),
    ] = ""
    operator: Annotated[
        str,
        msgspec.Meta(
            max_length=512,
            description="The secret that isthmus net set needs. Empty: the coordinator draws a key, and keeps it in "
            "the run's folder while the run goes on. Best given as ISTHMUS_OPERATOR.",
        ),
    ] = ""
    keys: Annotated[
        str,
        msgspec.Meta(
            description="A file that isthmus keys has made: coordinator.toml for the coordinator, NAME.toml for each "
            "node. It takes the place of a token."
        ),
    ] = ""
    encryption: Annotated[
        Literal["auto", "always", "never"],
        msgspec.Meta(
            description="Whether what nodes send each other is encrypted; auto: unless the receiver listens on its own "
            "machine only (loopback). What the coordinator and the nodes say to each other always is."
        ),
    ] = "auto"
    assignment: Annotated[
        Mode,
        msgspec.Meta(
            description="contiguous: a node owns neighbouring chunks; zigzag: early and late chunks, which balances "
            "causal work but sends up to twice as much; auto: the one whose step the planner finds shortest."
        ),
    ] = "contiguous"
    chunks_per_node: Annotated[
        tuple[_Count, ...],
        msgspec.Meta(
            description="Number of neighbouring chunks that each rank owns, such as [3, 1]; empty: equal shares."
        ),
    ] = ()
    relay: Annotated[
        Literal["never", "always", "auto"],
        msgspec.Meta(
            description="Whether nodes pass keys and values on to each other, so that each sends about as much as the "
            "others, and not the owners of the first chunks most; auto: where a node's links share its line (scope "
            "nic) and the planner finds the step shorter."
        ),
    ] = "never"
    replan: Annotated[
        Literal["share", "plan"],
        msgspec.Meta(
            description="How chunks are given out anew where nodes are lost or slow; share: each node gets as large a "
            "part as before; plan: as the planner finds the step shortest at the speeds that were measured, which "
            'assignment = "auto" chooses.'
        ),
    ] = "share"
    slow: Annotated[
        Literal["name", "unload"],
        msgspec.Meta(
            description="What is done about a node that computes slower than the others; name: it is named; unload: it "
            "also gets fewer chunks, until it is slow no more."
        ),
    ] = "name"
    slow_factor: Annotated[
        float,
        msgspec.Meta(
            gt=1, le=1000, description="How many times slower than the median of the others a slow node computes."
        ),
    ] = 2.0
    slow_steps: Annotated[
        int, msgspec.Meta(ge=1, le=10_000, description="Over how many steps that is judged, by their median.")
    ] = 20
    node_speeds: Annotated[
        tuple[Annotated[float, msgspec.Meta(gt=0)], ...],
        msgspec.Meta(
            description="TFLOP/s that each rank reaches in a training step, such as [125, 40], for assignment = "
            '"auto" and isthmus plan; empty: all are alike, as run.device suggests.'
        ),
    ] = ()
    join_timeout_s: Annotated[
        float, msgspec.Meta(gt=0, le=LONGEST_S, description="Seconds to wait for all nodes to join, or to come back.")
    ] = 120.0
    heartbeat_interval_s: Annotated[
        float, msgspec.Meta(gt=0, le=LONGEST_S, description="Seconds between heartbeats.")
    ] = 1.0
    heartbeat_timeout_s: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=LONGEST_S,
            description="Seconds without a heartbeat after which a node or the coordinator counts as lost.",
        ),
    ] = 15.0
    return_timeout_s: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=LONGEST_S,
            description="Seconds, after coordinator.heartbeat_timeout_s, for which nodes wait for a coordinator that "
            "was lost. One that is started again goes on with them.",
        ),
    ] = 120.0
    step_timeout_s: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=LONGEST_S,
            description="Seconds by which the slowest node may lag behind the first one, in a step or an averaging, "
            "before the others go on without it.",
        ),
    ] = 300.0
    progress_timeout_s: Annotated[
        float,
        msgspec.Meta(
            gt=0, le=LONGEST_S, description="Seconds within which some node must finish a step, or the run ends."
        ),
    ] = 3600.0

    def check(self, path: str) -> None:
        """Raise `ConfigError` for an address without interface, a missing token, or settings at odds."""
        host = self._host(path)
        if not self.token and not self.keys and not is_loopback(host):
            raise ConfigError(
                f'{path}token = "": {host} can be reached from other machines; give a secret token, '
                "the same to the coordinator and to every node (ISTHMUS_TOKEN in the environment)"
            )
        if self.heartbeat_timeout_s < 2 * self.heartbeat_interval_s:
            raise ConfigError(
                f"{path}heartbeat_timeout_s = {self.heartbeat_timeout_s}: expected at least twice "
                f"{path}heartbeat_interval_s ({self.heartbeat_interval_s})"
            )
        if self.min_nodes > self.nodes:
            raise ConfigError(
                f"{path}min_nodes = {self.min_nodes}: expected at most {path}nodes ({self.nodes}), so that the run can "
                "begin"
            )
        if self.node_speeds and len(self.node_speeds) != self.nodes:
            raise ConfigError(
                f"{path}node_speeds = {list(self.node_speeds)}: expected {self.nodes} speeds, one for each of "
                f"{path}nodes, or none"
            )
        if not self.chunks_per_node:
            return
        if len(self.chunks_per_node) != self.nodes:
            raise ConfigError(
                f"{path}chunks_per_node = {list(self.chunks_per_node)}: expected {self.nodes} counts, "
                f"one for each of {path}nodes"
            )
        if self.assignment != "contiguous":
            raise ConfigError(
                f'{path}assignment = "{self.assignment}": {path}chunks_per_node gives contiguous runs; '
                'set assignment = "contiguous" or leave chunks_per_node out'
            )

    @property
    def layout(self) -> Layout:
        """Where the run's processes stand: each node is a site of stages × shards."""
        return Layout(self.nodes, self.stages, self.shards)

    @property
    def relays(self) -> bool:
        """Whether nodes pass keys and values on. Raises `ConfigError` where that is still to be chosen ("auto")."""
        if self.relay == "auto":
            raise ConfigError(
                'coordinator.relay = "auto": isthmus run, coordinator and plan choose; here, set never or always'
            )
        return self.relay == "always"

    def _host(self, path: str) -> str:
        match = _ADDRESS.fullmatch(self.address)
        if match is None or int(match["port"]) > 65535:
            raise ConfigError(
                f'{path}address = "{self.address}": expected tcp://INTERFACE:PORT, such as tcp://127.0.0.1:0'
            )
        host = match["host"].strip("[]")
        if host in ("*", "0.0.0.0", "::"):
            raise ConfigError(
                f'{path}address = "{self.address}": name one interface, by its address or its name '
                "(tcp://10.0.0.5:7070, tcp://eth0:7070); listening on all interfaces is not supported"
            )
        return host


def is_loopback(host: str) -> bool:
    """Whether an interface or address is reached from this machine only."""
    host = host.strip("[]")
    if host in ("localhost", "lo"):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
