"""The files of checkpoints, brought together at the coordinator, and given out again when a run is resumed.

messages   what nodes and coordinator say to each other about files
taking     which pieces of a file are still missing: a machine without I/O
depot      the files of a run on this machine's disk
collector  the coordinator's side
courier    a node's side
"""
