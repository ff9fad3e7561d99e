"""`isthmus coordinator`: serves the rendezvous, barriers and averaging rounds of one run, and records its metrics."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial

from msgspec.structs import replace

from coordinator.assignment import Assignment
from coordinator.events import Record
from coordinator.files.collector import Collector
from coordinator.files.depot import Depot
from coordinator.layout import check_stages
from coordinator.messages import Watched
from coordinator.plan import RunPlan, Worker
from coordinator.records.folder import (
    ADDRESS,
    CONFIG,
    METRICS,
    complete_checkpoints,
    discard_unstarted,
    drop_before,
    make_folder,
    mark_complete,
    step_of,
)
from coordinator.records.lease import Lease
from coordinator.records.lock import SERVING, locked
from coordinator.records.recorder import Recorder
from coordinator.records.secret import drop_secret, keep_secret
from coordinator.records.state_file import STATE, StateFile, drop_state, read_state
from coordinator.records.tail import Tail
from coordinator.records.tracker import Tracker
from coordinator.server import CoordinatorServer
from coordinator.state import SavedState, decode_state, encode_state, slot_bytes
from netem.children import Children
from netem.errors import ConfigError, RunAborted
from netem.profile import resolve_schedule
from node.commands.dashboard import PageWish, start_page
from node.config import OPERATOR_VARIABLE, TOKEN_VARIABLE, Config, public_toml, public_tree, save_config
from node.train.resume import check_can_start, log_changes, set_refused_aside, start_step
from node.train.schedule import StepSchedule
from node.watch.view import View

log = logging.getLogger("isthmus.coordinator")


def settle_assignment(config: Config) -> Config:
    """The config with "auto" in `coordinator.assignment` and `relay` replaced by what the planner chooses, which the
    log says."""
    if "auto" not in (config.coordinator.assignment, config.coordinator.relay):
        return config
    from node.lab.plan.assignments import settle  # torch takes seconds to import
    from node.lab.plan.text import choice_lines

    config, choice = settle(config)
    if choice is not None:
        log.info("%s", "\n".join(choice_lines(choice)))
    return config


def run_coordinator(config: Config, page: PageWish | None = None) -> None:
    """Serve one run to its end. Raises `RunAborted` where it does not reach its last step.

    The run's folder is locked meanwhile: `ConfigError` where another process serves it.
    """
    check_stages(config.coordinator.layout)
    config = settle_assignment(config)
    folder = config.run.folder
    if left_state(config) is None:
        check_can_start(config)  # before anything is written
    is_new = not folder.exists()
    make_folder(folder)
    with locked(folder, SERVING):
        try:
            with Lease(folder).held() as lease:
                _serve(config, page, lease)
        except OSError as error:
            raise RunAborted(f"the coordinator cannot write its files: {error}") from None
        except ConfigError:
            if is_new:
                discard_unstarted(folder)
            raise


def _serve(config: Config, page: PageWish | None, lease: Lease) -> None:
    folder = config.run.folder
    state = left_state(config)
    if state is None:
        first = done = start_step(config)
        log_changes(config)
        set_refused_aside(config)
    else:
        first, done = state.start_step, state.step
        log.warning("an earlier coordinator was lost: going on after step %d with its %d nodes", done, len(state.seats))
    (folder / ADDRESS).unlink(missing_ok=True)
    save_config(config, folder / CONFIG)
    network, steps = resolve_schedule(config.net), StepSchedule(config.model, config.compress, config.train)
    plan = RunPlan(
        run_name=config.run.name,
        chunks=config.model.chunks,
        steps=config.train.steps,
        batch=config.train.batch,
        config_digest=config.digest(),
        rounds_for=lambda done: steps.rounds(done + 1),
        begins_for=lambda done: steps.begins(done + 1),
        ends_for=lambda done: steps.ends(done + 1),
        lost_with=steps.alone,
        start_step=first,
        start_cursor=first * config.train.batch,
        schedule=network,
        share_out=_planner(config),
        keep_last=config.train.keep_last,
        kept=[step_of(checkpoint) for checkpoint in complete_checkpoints(folder)],
    )
    view, tail, began_s = View(config, say=log.info), Tail(), time.monotonic()

    def record(measured: Record) -> None:
        line = recorder.record(measured)
        tail.add(line)
        view.feed(line)
        tracker.add(line)

    def show(after: int, state: str) -> Watched:
        lines, number = tail.after(after)
        elapsed_s = time.monotonic() - began_s
        return Watched(config=public_toml(config), lines=lines, number=number, elapsed_s=elapsed_s, state=state)

    tracker = Tracker(config.run.tracker, config.run.name, public_tree(config))
    with (
        tracker,
        Recorder(folder, done=done, dilation=network.profile.dilation) as recorder,
        StateFile(folder / STATE, slot_bytes(config.coordinator.layout.processes)) as kept,
        view,
    ):
        if recorder.missing:
            log.warning("%s: steps without a record: %s; they are not done again", folder / METRICS, recorder.missing)
        server = CoordinatorServer(
            config.coordinator if state is None else replace(config.coordinator, address=state.address),
            plan,
            record=record,
            fault=recorder.fault,
            checkpoint_complete=partial(_complete, config),
            show=show,
            keep=lambda state: kept.write(encode_state(state)),
            state=state,
            collector=Collector(Depot(folder), config.train.steps) if config.train.collect else None,
        )
        if server.operator_file is not None:
            keep_secret(folder, server.operator_file)
        (folder / ADDRESS).write_text(server.address + "\n")
        log.info("run %s: waiting for %d nodes at %s", config.run.name, config.coordinator.nodes, server.address)
        _stop_on_signals(server)
        lease.on_lost(server.stop)
        try:
            with Children() as children:
                if page is not None:
                    given = config.coordinator
                    environment = os.environ | {TOKEN_VARIABLE: given.token, OPERATOR_VARIABLE: given.operator}
                    start_page(children, folder, page, None, environment)
                outcome = server.serve()
        finally:
            drop_secret(folder)
    drop_state(folder / STATE)
    if not outcome.ok:
        raise RunAborted(f"the run ended before its last step: {outcome.reason}")
    log.info("run %s: done after %d steps", config.run.name, config.train.steps)


def _planner(config: Config) -> Callable[[Sequence[Worker]], Assignment] | None:
    """What gives the chunks to the nodes that are left, where the planner does."""
    if config.coordinator.replan != "plan":
        return None
    from node.lab.plan.assignments import share_out  # now, since the nodes would wait for torch's import later

    return partial(share_out, config)


def left_state(config: Config) -> SavedState | None:
    """What a coordinator of this run that was killed has left, from which another one goes on; None where there is
    none. Raises `ConfigError` where it is of another config."""
    path = config.run.folder / STATE
    data = read_state(path)
    return None if data is None else decode_state(data, config.run.name, config.digest(), str(path))


def _complete(config: Config, step: int, nodes: int) -> None:
    """Mark a checkpoint, and remove those that are too old. Where the disk fails, the one before stays the last."""
    folder, keep_last = config.run.folder, config.train.keep_last
    try:
        mark_complete(folder, step, nodes)
    except OSError as error:
        log.warning("no checkpoint after step %d, training goes on: %s", step, error)
        return
    kept = complete_checkpoints(folder)[:keep_last]
    if kept:
        drop_before(folder, step_of(kept[-1]))


def _stop_on_signals(server: CoordinatorServer) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: server.stop(f"stopped by {signal.Signals(received).name}"))
