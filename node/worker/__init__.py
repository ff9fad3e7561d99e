"""A node from joining to leaving (`node`), the world of each generation (`world_builder`), metrics (`meter`), and
what a node computes on (`machine`)."""
