"""Downstream scores of a checkpoint, by lm-evaluation-harness on local files.

Nothing here uses the network.  The libraries read these variables when they are imported, so they
are set here, before anything below imports one of them.
"""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    DISABLE_MULTIPROC="1",  # lm-eval's bootstrap would fork a process per core
)
