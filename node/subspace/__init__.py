"""The compression of keys and values (the paper's Algorithm 1).

`basis` finds the principal directions and proves them equal on all nodes; `rotation` turns a basis by a chunk's
parameters θ; `codec` joins the two into encode and decode for one layer's K or V; `ranks` says how many directions each
layer gets; `energy` reports what they keep.
"""
