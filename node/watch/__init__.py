"""What a person sees of a run: the live view (`view`), the report's picture (`report`), a step's trace (`trace`)."""
