"""Fuzzing of all that strangers and peers may send. `targets` are the functions, `run` drives them with atheris."""
