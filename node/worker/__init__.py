"""A node from joining to leaving (`node`), the world of each generation (`world_builder`), and metrics (`meter`)."""
