"""What stands below the options in the help of each command: examples, and what to know beside them."""

from __future__ import annotations

SETTINGS = """\
Every setting of the config can also be given on the command line, before or after the file:
  --train.steps 100  --compress.mode dense  --net.profile datacenter-100gbps
`isthmus settings` lists the presets and all settings with their defaults, `isthmus settings train` those of one
section, and `isthmus settings --preset NAME` what a preset sets. What comes later in this order takes precedence:
  defaults < preset < config file < command line
"""

EVAL = """\
Settings may differ from those of the run, such as --compress.mode dense or --run.device cuda.
"""

NET = """\
Settings of the network take the place of the profile's:
  isthmus net verify --profile datacenter-100gbps --net.dilation 50
As root on Linux, the same transfers are also made under the kernel's token bucket (tc-tbf), for comparison.
"""

LIVE = """\
While `isthmus run configs/demo.toml` goes on in another terminal:
  isthmus net set --coordinator outputs/demo --rate '50 Mbit/s'
  isthmus net set --coordinator outputs/demo --latency '80 ms' --pair node-0 node-1
  isthmus net cut node-0 'node-[12]' --coordinator outputs/demo
  isthmus net heal --coordinator outputs/demo
Nothing in flight is lost. A cut only delays the run if it is shorter than the time that nodes may be silent.
"""

DOCTOR = f"""\
Before a run, on every machine that shall take part, all with the same ISTHMUS_TOKEN; the first one where the
coordinator will run:
  isthmus doctor run.toml --listen tcp://100.64.0.1:7070 --nodes 3
  isthmus doctor run.toml --join tcp://100.64.0.1:7070
{SETTINGS.rstrip()}
"""

DATA = """\
The others wait for a node that must first fetch and tokenise a large corpus. Run this on every machine before:
  isthmus data prepare configs/demo.toml
"""

GENERATE = """\
Each token takes a whole pass, so this is for a look at what a model has learned:
  isthmus generate outputs/demo --prompt 'It was a dark'
Settings may differ from those of the run, such as --run.device cuda.
"""

LAUNCH = f"""\
The launcher starts the same command for every node, and says in the environment which one it is: RANK, WORLD_SIZE and
MASTER_ADDR, or SLURM_PROCID and SLURM_NTASKS, or JOB_COMPLETION_INDEX. The process of rank 0 serves the run as well:
  torchrun --nproc-per-node 4 --no-python isthmus launch configs/demo.toml
{SETTINGS.rstrip()}
"""

WATCH = """\
It shows what `isthmus run` shows, and disturbs nothing; Ctrl-C ends only the view:
  isthmus watch outputs/demo
  isthmus watch tcp://10.0.0.5:7070
The second needs the run's token in ISTHMUS_TOKEN, or the operator's key.
"""

PLAN = f"""\
{SETTINGS.rstrip()}
With --coordinator.assignment auto it compares ways to give chunks to nodes, and plans the one that a run would take.
Exit code 3: the config does not fit the memory of --device.
"""

DASHBOARD = """\
While a run goes on, or afterwards; `isthmus run CONFIG --dashboard 127.0.0.1:7080` serves it from the start:
  isthmus dashboard outputs/demo
The addresses to open, with their secrets, are in dashboard.links in the run's folder. With one a browser may look, with
the other it may also change the network. The page is served without encryption: leave it on 127.0.0.1, and reach it
from elsewhere through a tunnel, such as ssh -L 7080:127.0.0.1:7080 HOST.
It needs pip install 'isthmus[web]'.
"""

CHAOS = f"""\
{SETTINGS.rstrip()}
Kinds: kill, stop (SIGSTOP), slow; deaf, mute, cut, delay, corrupt, truncate on the way to a node; leader (the
coordinator is killed). What ends is started again. Only processes that the command has started are touched:
  isthmus chaos configs/tiny.toml --coordinator.nodes 4 --train.steps 100000 --minutes 10 --seed 3
"""

TRACE = """\
A run records the steps that it is asked for:
  isthmus run configs/demo.toml --run.trace 40..42
  isthmus trace outputs/demo --step 41
On several machines each node writes to its own run.outputs: copy trace/node-*.jsonl of all into one folder first.
"""

TUNNEL = """\
Settings change the target. The small model has the target's layers, chunks, ownership and [compress]:
  isthmus tunnel --target paper-800m --nodes 8 --net internet-300mbps --compress.dense_last_layers 0 --run
Exit code 1: in some run the ratio of communication to compute, the latency or the averaging was more than 10 % off.
"""

BENCH = """\
Each node is a process in a network namespace; without root, Linux or iproute2 it says so and measures nothing. Settings
change the model for all arms:
  isthmus bench --quick --train.batch 2 --out outputs/quick
It writes bench.md, bench.json and bench.png. All of it takes less than 20 minutes on two cores.
"""

EXPERIMENT = """\
figure2 trains one small model centralized, compressed, uncompressed, with 10 % of the numbers and with 4 bits, each
under a network in the same proportion to its compute as 300 Mbit/s a link are to the paper's 800M model on four A100s.
An arm that is complete is not run again, and one that was interrupted goes on from its checkpoint. Expect
about an hour on two idle cores, most of it for the uncompressed arm. Settings change the target, as in `isthmus
tunnel`.
"""

COMPLETION = """\
Options, settings, presets and files are completed. To set it up:
  bash:  isthmus completion bash > ~/.local/share/bash-completion/completions/isthmus
  zsh:   isthmus completion zsh > ~/.zsh/completions/_isthmus       (a folder that is in $fpath)
  tcsh:  isthmus completion tcsh | sudo tee /etc/profile.d/isthmus.completion.csh
"""

KEYS = """\
With a token, everyone who has it may join. With keys, each node has an invitation of its own, which can be taken back:
  here  $ isthmus keys keys --nodes 2                      then give each machine its own file, over a safe way
  one   $ isthmus coordinator run.toml --coordinator.keys keys/coordinator.toml --coordinator.address tcp://10.0.0.5:7070
  each  $ isthmus node run.toml --coordinator.keys keys/node-0.toml --join tcp://10.0.0.5:7070 --bind tcp://eth0:0
  you   $ isthmus net show --key keys/operator.toml --coordinator tcp://10.0.0.5:7070
"""

OVERVIEW = """\
examples:
  isthmus run configs/demo.toml                            a coordinator and four nodes on this machine
  isthmus run configs/tiny.toml --coordinator.nodes 2      the same in small, on two nodes
  isthmus eval outputs/demo                                held-out loss of its last checkpoint
  isthmus report outputs/demo outputs/demo-2 --out a.png   two runs in one picture
  isthmus trace outputs/demo --step 41                     a recorded step (--run.trace 41), for Perfetto's viewer
  isthmus run configs/demo.toml --compress.mode dense --run.name dense      any setting can be given here
  isthmus export outputs/dense hf/dense                    its model, as a folder for transformers
  isthmus study control                                    a study: how much the far context is worth
  isthmus plan configs/paper-800m.toml --nodes 8           how long a step would take elsewhere; runs nothing
  isthmus tunnel --target paper-800m --net lte --run       a small run here with the same ratios as a large one
  isthmus bench --quick                                    beside all-gather over gloo, on a wire shaped by the kernel
  isthmus run configs/demo.toml --preset home              as between homes: `isthmus settings` lists the presets

on several machines:
  one   $ ISTHMUS_TOKEN=… isthmus coordinator run.toml --coordinator.address tcp://10.0.0.5:7070
  each  $ ISTHMUS_TOKEN=… isthmus node run.toml --join tcp://10.0.0.5:7070 --bind tcp://eth0:0
"""
