"""netem: the network floor. It knows bytes and seconds, and nothing of tensors or training.

Endpoints exchange messages over ZeroMQ, in order and exactly once, at the rate and latency of a profile. How a network
behaves is computed in modules without I/O or clock; one thread per endpoint does what they compute.

Words, each with one meaning:

    link      one direction of one pair of nodes. It has latency, jitter and loss, and in scope `link` a rate of its own
    pair      two nodes in order, sender and receiver: how a profile names a link (`network.Pair`)
    line      a node's connection to all others, with a rate up and a rate down (`network.Line`)
    NIC       one direction of a line in scope `nic`, where all links of the node share its rate
    lane      the queues of a sender for one peer: all that waits for that link (`lane.Lane`)
    flow      messages of one lane that keep their order; the flows of a lane take turns (`lane.Flow`)
    port      lanes that share one token bucket, which sends one segment at a time (`lane.Port`): in scope `link` each
              lane has a port, in scope `nic` all lanes of a node share one. In an address, a port is TCP's
    scope     what has the rate: each link, or each NIC

`link.Link` is the protocol's state at one end for one peer, for both links between the two. "Way" is not a term here.

Reading order:

    units, profile    a network as people write it
    network           the same in numbers; time dilation
    changes, trace    what may change in it while it runs; rates of a line over time, from files
    schedule          the network at any moment
    bucket            when bytes have left, at a given rate
    delay             how long they travel: latency, jitter, and the delay that TCP makes of loss
    segments, frames  a message cut into segments; the header of each
    link              reliability and credit between two endpoints
    lane              which segment is next
    shaper            when it has left, and when it arrives
    ingress           how the senders to one NIC share it
    assembly          segments put together again, in buffers of the upper floor
    keys, door        who may call, by CURVE keys; how many strangers are too many
    porter            these two joined to ZeroMQ's handshakes
    sockets           ZeroMQ, and the guarantees that it does not give
    peers             the endpoint's peer table and per-peer counters
    engine            all these joined to the sockets and the clock
    endpoint          the thread that runs the engine: what the upper floors use
    host              what this machine can carry, measured and reported
    verify            how true a profile is on this machine, measured and certified
    names, limits, counters, tables    names of peers; caps; totals; Markdown tables
    config, errors    settings from TOML; what can go wrong

What is public, for use from Python; all else may change without notice:

- `netem.endpoint.Endpoint`, `netem.endpoint.unique`: one node's place in the emulated network
- `netem.assembly.Receiver`: what an endpoint calls when messages arrive
- `netem.profile.NetConfig`, `netem.profile.resolve`, `netem.profile.builtin_names`: networks, by name, file or settings
- `netem.schedule.Schedule`: a network that changes over time
- `netem.limits.Limits`, `netem.counters.LinkCounters`: caps of an endpoint, and totals for each peer
- `netem.keys.Access`, `netem.keys.new_pair`: how an endpoint proves who it is
- `netem.errors`: all errors that are meant for callers

`examples/shape_a_link.py` uses them.
"""
