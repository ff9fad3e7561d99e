"""What a person sees of a run: the live view (`view`) and the report's picture (`report`)."""
