"""What a coordinator keeps of its run on disk, and how it goes on from that after it was killed. No I/O.

Whatever a node may have been told follows from the state. So after a restart every member is welcomed, and told the
last commit and the network's changes, once more, which changes nothing where they are known. Then comes the next
generation's roster: a step that counts is taken where it is still held, and one that does not is done again.
"""

from __future__ import annotations

from coordinator.events import Action, Send
from coordinator.generations import Generations
from coordinator.live import LiveNetwork
from coordinator.membership import Membership
from coordinator.messages import Commit
from coordinator.plan import RunPlan
from coordinator.state import Ending, SavedState
from coordinator.steps import Steps


def save(
    plan: RunPlan,
    membership: Membership,
    generations: Generations,
    steps: Steps,
    live: LiveNetwork,
    ending: Ending | None = None,
) -> SavedState | None:
    """The state now, with times of the machine's clock; None before the first node has joined."""
    if generations.roster is None and not len(membership) and ending is None:
        return None
    return SavedState(
        run=plan.run_name,
        config_digest=plan.config_digest,
        start_step=plan.start_step,
        generation=membership.generation,
        step=steps.step,
        tail=steps.tail,
        next_round=steps.rounds.next_id,
        committed=steps.committed,
        members=[peer for peer in generations.members if peer in membership],
        lacking=generations.lacking,
        gone=generations.gone,
        seats=membership.seats(),
        began_s=live.began_s,
        changes=[alter.timed for alter in live.changes()],
        ending=ending,
    )


def restore(
    state: SavedState, membership: Membership, generations: Generations, steps: Steps, live: LiveNetwork, now_s: float
) -> list[Action]:
    """Take up a saved state, whose times are of the machine's clock. The next generation is still to begin."""
    membership.restore(state.seats, state.generation, now_s)
    actions: list[Action] = [Send(seat.peer, membership.welcome(seat.join)) for seat in state.seats]
    if not state.members or state.ending is not None:  # the nodes were joining, or leave
        return actions
    steps.restore(state.step, state.tail, state.next_round, state.committed)
    generations.restore(state.members, state.lacking, state.gone)
    actions += live.restore(state.began_s, state.changes, now_s)
    for peer in generations.members:
        actions += [Send(peer, Commit(round_id=state.committed, again=True))] if state.committed >= 0 else []
        actions += [Send(peer, alter) for alter in live.changes()]
    return actions
