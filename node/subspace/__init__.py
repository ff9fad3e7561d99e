"""The compression of keys and values (the paper's Algorithm 1).

`basis` finds the principal directions and proves them equal on all nodes; `rotation` turns a basis by a chunk's
parameter θ; `codec` joins the two into encode and decode for one layer's K or V.
"""
