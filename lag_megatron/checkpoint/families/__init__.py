"""Families of models, as data: what each parameter is for, by name.  Nothing here imports torch."""
