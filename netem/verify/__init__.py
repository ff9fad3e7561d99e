"""How true an emulated network is on this host: `isthmus net verify`. Reading order:

promise      how long a transfer should take on a profile, and whether a measured one is right: arithmetic
child        one process that sends and receives on command, through an endpoint or plain TCP (`Carrier`)
party        these processes from the side of their parent; and processes that keep the cores busy
kernel       two network namespaces under the kernel's token bucket, as a reference
lan          several of them on a bridge, for what runs on whole machines (`isthmus bench`)
measure      timed transfers between these processes
certificate  the transfers of one profile's certificate
suites       the transfers of the tables in docs/netem
render       a certificate as text, as Markdown, and as one JSON object
"""
