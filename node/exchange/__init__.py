"""How keys and values reach the owners of later chunks, and how their gradients come back.

`payload` says what travels and how many bytes it is: the closed formula that the wire is tested against; `formats`
how each tensor is rounded and packed for it. `passes` names a pass; `chunks` is the exchange, with the handle of a pass
under way, and `functions` what autograd runs for it. `tags` names a tensor on the wire; `inbox` validates and holds
what arrives; `wire` joins them to a `netem` endpoint. `routes` says by which nodes a payload comes to its readers,
where they pass it on, and `pieces` holds its parts. With all chunks on one node nothing moves, and everything is
rounded as if it did.
"""
