"""How true an emulated network is on this host: `isthmus net verify`. Reading order:

promise   what a profile promises of a transfer, and how a measured one is judged: arithmetic
child     one process that sends and receives when told to; several ways to carry (`Carrier`)
party     those processes, started, commanded and ended; and the ones that keep the cores busy
kernel    two network namespaces under the kernel's own token bucket, as a reference that is not ours
measure   transfers through all that, timed
suites    which transfers: a profile's certificate, and the tables of docs/netem
render    as a table, as Markdown, as one JSON object
"""
