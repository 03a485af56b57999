"""The keys of a configuration as frozen dataclasses, and what follows from them by arithmetic.

One module a section: ``run`` has the whole (:class:`RunConfig`) with stages and growth.
"""
