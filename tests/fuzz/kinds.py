"""All kinds of files that the product reads; a new reader adds its own here."""

import checkpoint_kinds
import data_kinds
import run_kinds
import settings_kinds

KINDS = [*settings_kinds.KINDS, *run_kinds.KINDS, *data_kinds.KINDS, *checkpoint_kinds.KINDS]
