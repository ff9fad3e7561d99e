"""Named experiments that train in the wind tunnel: `isthmus experiment`.

`arms` says what is trained, `stage` makes an arm's networks and configs, `clock` turns its records into times of the
target, `page` and `picture` show them. `node.commands.experiment` runs the arms.
"""
