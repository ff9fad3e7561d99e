"""Both machines, joined by a fake wire, under a thousand random schedules of faults.

Safety, which is checked whenever a node enters a generation: a generation has one roster, and all members of it have
taken the same tries at the same steps and have applied the same rounds. Liveness: the run ends, well or with a reason.
"""

from __future__ import annotations

from collections import Counter

import pytest
from helpers.faulty_world import FaultyWorld, gone

SCHEDULES, PARTS = 1200, 8


@pytest.mark.parametrize("part", range(PARTS))
def test_no_schedule_of_faults_halves_a_step_or_hangs(part: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(part, SCHEDULES, PARTS):
        world = FaultyWorld(seed)
        outcome = gone(world, seed)
        assert outcome.ok or outcome.reason, seed
        seen["ended well" if outcome.ok else "ended with a reason"] += 1
        seen["generations"] += len(world.rosters)
        seen["faults"] += len(world.happened)
        seen["joined later"] += any(entry.joins for roster in world.rosters.values() for entry in roster.members)
        if outcome.ok:
            ended = [node for node in world.living() if node.begun and node.known == max(world.rosters)]
            assert all(len(node.weights.taken) == world.wire.plan.steps for node in ended), seed
    print(dict(seen))
    assert seen["ended well"] > SCHEDULES / PARTS / 4, "most faults must be survived"
    assert seen["joined later"] > 0
