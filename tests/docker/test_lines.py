"""Real 300 Mbit/s lines between containers, beside the emulated ones: a step takes as long on both.

Run with -s to see the table that docs/docker.md has.
"""

from statistics import median

import pytest
from helpers.containers import Project, shape_line

RATE = 300
CONFIG = """
[run]
threads = 1
[model]
layers = 6
d_model = 128
heads = 4
kv_heads = 4
head_dim = 64
ffn_dim = 256
context = 1024
chunks = 4
[compress]
mode = "dense"
format = "float32"
[train]
steps = {steps}
batch = 4
sync_every = 1
eval_every = 0
[data]
tokenizer = "bytes"
[net]
profile = "{profile}"
scope = "nic"
latency = "0 ms"
[coordinator]
nodes = 4
"""
STEPS, COLD = 14, 4


@pytest.mark.timeout(1500)
def test_a_step_on_real_lines_takes_as_long_as_on_emulated_ones(project: Project) -> None:
    times_s: dict[str, list[float]] = {"real": [], "emulated": []}
    for turn in range(2):
        for kind in times_s:
            run = f"{kind}-{turn}"
            profile = "unshaped" if kind == "real" else "internet-300mbps"
            project.configure(CONFIG.format(profile=profile, steps=STEPS))
            project.environment |= {"ISTHMUS_NODES": "4", "ISTHMUS_PROFILE": profile, "ISTHMUS_RUN": run}
            project.compose("up", "--detach")
            if kind == "real":
                for container in project.containers("node"):
                    shape_line(container, f"{RATE}mbit")
            assert set(project.await_end(400).values()) == {0}
            times_s[kind].append(project.step_s(run, COLD))
            project.compose("down", "--volumes", "--timeout", "5")
    real_s, emulated_s = median(times_s["real"]), median(times_s["emulated"])
    print(f"\nreal lines {1e3 * real_s:.0f} ms a step, emulated {1e3 * emulated_s:.0f} ms, {emulated_s / real_s:.3f} ×")
    assert emulated_s == pytest.approx(real_s, rel=0.25)  # docs/docker.md has what an idle machine measures
