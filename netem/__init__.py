"""netem: the network floor. Bytes and seconds; no tensors, no training.

Endpoints exchange messages over ZeroMQ, in order and exactly once, at the rate and latency of a profile. What a
network does is arithmetic in modules without I/O or clock; one thread per endpoint carries it out. Reading order:

    units, profile    what a network is, as people write it
    network           the same in numbers; time dilation
    changes, trace    what may change in it while it runs; rates of a line over time, from files
    schedule          when: the network at any moment
    bucket            when bytes have left, at a rate
    delay             how long they travel: latency, jitter, what TCP makes of loss
    segments, frames  a message cut into segments; the header of each
    link              reliability and credit between two endpoints
    lane              whose segment is next
    shaper            when it has left, when it arrives
    ingress           how the senders to one NIC share it
    assembly          segments back into messages, in lent buffers
    sockets           ZeroMQ, and what it does not do for us
    peers             whom an endpoint knows, strangers among them
    engine            all these joined to the sockets and the clock
    endpoint          the thread that runs it: what the upper floors use
    host              what this machine can carry, said aloud
    verify            how true a profile is here, measured and certified
    names, limits, counters, config, errors   who is who; caps; totals; settings from TOML; what can go wrong
"""
