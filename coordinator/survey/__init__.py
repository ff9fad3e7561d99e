"""A survey of the machines that want to train together, before they do: `isthmus doctor`. Reading order:

messages  what the machines say to each other
turns     who measures what, one turn after another: arithmetic
host      the machine of the one that was started first: who has come, whose turn it is, what was found; no I/O
guest     the machine of everyone: dial the others, measure, report; no I/O
line      an endpoint with a queue: what host and guest have in common
serve     host and guest with endpoint and clock around them
"""
