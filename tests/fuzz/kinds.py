"""All kinds of files that the product reads; a new reader adds its own here."""

import run_kinds
import settings_kinds

KINDS = [*settings_kinds.KINDS, *run_kinds.KINDS]
